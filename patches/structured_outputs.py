"""Grammars for the autoregressive requests of TwoTower (upstream: vllm/sampling_params.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace, serves_two_tower

VALIDATION = "vllm.sampling_params:SamplingParams._validate_structured_outputs"


class AsIfCausal:
    """A ModelConfig that says it is not a diffusion model's."""

    is_diffusion = False

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_config, name)


def install_validation() -> None:
    """Check a TwoTower request's grammar as a causal model's: ``_validate_diffusion`` has refused it for blocks."""
    holder, name = locate(VALIDATION)
    upstream_validate = getattr(holder, name)

    @functools.wraps(upstream_validate)
    def validate(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        upstream_validate(
            self, AsIfCausal(model_config) if serves_two_tower(model_config) else model_config, *args, **kwargs
        )

    replace(VALIDATION, validate)


PATCHES = (
    Patch(
        name="structured-outputs-validation",
        target=VALIDATION,
        what="SamplingParams._validate_structured_outputs checks a TwoTower request as one for a causal model.",
        why="vLLM refuses grammars for every diffusion model; TwoTower's autoregressive requests can have them, and "
        "blocks are refused one by our own validation just before.",
        upstream="https://github.com/vllm-project/vllm/issues/45436",
        remove_when="vLLM lets a diffusion model say which requests can have structured outputs",
        applies_when=everywhere,
        sources=(VALIDATION, "vllm.sampling_params:SamplingParams.verify"),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "1fdadd0a01671330fd43daa28336d7e11011db1d74cd2bf91293d1f790068c1c"
        ),
        install=install_validation,
    ),
)
