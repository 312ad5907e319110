"""`python -m vllm_twotower.training CONFIG`, the same as `vllm-twotower train CONFIG`."""

from vllm_twotower.training.cli import main

main()
