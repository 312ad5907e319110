"""`vllm`, its processes forked from one that has imported what they need: python shared_imports.py serve MODEL ...

vLLM on CPUs has every process import it again, most of the start of an engine of several.
"""

from __future__ import annotations

import multiprocessing
import sys

from vllm.utils import system_utils

CONTEXT = multiprocessing.get_context("forkserver")
# This module first: processes start processes of their own in the same way.
CONTEXT.set_forkserver_preload(["shared_imports", "vllm.v1.worker.cpu_worker", "vllm_twotower.model.two_tower"])
system_utils.get_mp_context = lambda: CONTEXT  # before other modules take it

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
