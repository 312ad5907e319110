"""Replaces the check of a request's sampling parameters for the TwoTower model (upstream: vllm/sampling_params.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace, serves_two_tower

VALIDATION = "vllm.sampling_params:SamplingParams._validate_diffusion"


def install_validation() -> None:
    """Check a TwoTower request with this package's own rules, any other request with vLLM's."""
    holder, name = locate(VALIDATION)
    upstream_validate = getattr(holder, name)

    @functools.wraps(upstream_validate)
    def validate(self: Any, model_config: Any) -> None:
        if not serves_two_tower(model_config):
            upstream_validate(self, model_config)
            return
        from vllm_twotower.config import validate_sampling_params

        validate_sampling_params(self, model_config)

    replace(VALIDATION, validate)


PATCHES = (
    Patch(
        name="sampling-params-validation",
        target=VALIDATION,
        what="SamplingParams._validate_diffusion calls vllm_twotower.config.validate_sampling_params for TwoTower.",
        why="vLLM rejects temperature, seed and others for every diffusion model; the TwoTower sampler honours some.",
        upstream="not reported; the check came with https://github.com/vllm-project/vllm/pull/45418",
        remove_when="vLLM lets a diffusion model say which sampling parameters it supports",
        applies_when=everywhere,
        sources=(VALIDATION, "vllm.sampling_params:SamplingParams.verify"),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "dc2861cc0a3a6bd5ca7db84c05c2394eec1b91d05d733643059dd4920fa548d0"
        ),
        install=install_validation,
    ),
)
