"""Prefix caching is off for TwoTower models unless somebody asks for it (upstream: vllm/config/model.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace, serves_two_tower

SUPPORT = "vllm.config.model:ModelConfig.is_prefix_caching_supported"


def install_support() -> None:
    """Answer no for the TwoTower model: vLLM takes the answer for the default of ``--enable-prefix-caching``."""
    holder, name = locate(SUPPORT)
    upstream = vars(holder)[name].fget

    @functools.wraps(upstream)
    def is_prefix_caching_supported(self: Any) -> bool:
        return not serves_two_tower(self) and upstream(self)

    replace(SUPPORT, property(is_prefix_caching_supported))


PATCHES = (
    Patch(
        name="prefix-caching-default",
        target=SUPPORT,
        what="ModelConfig.is_prefix_caching_supported is false for TwoTower, so that the default is off.",
        why="vLLM turns prefix caching on by default for hybrid models, and leaves no trace of whether a user asked "
        "for it; the TwoTower engine refuses it in words, which must not hit those who did not ask.",
        upstream="not reported",
        remove_when="prefix caching works for TwoTower models, or a model class can say that it is not supported",
        applies_when=everywhere,
        sources=(SUPPORT, "vllm.engine.arg_utils:EngineArgs._set_default_chunked_prefill_and_prefix_caching_args"),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "00bdee015e1b918da1f224c7e442e24641653a900bb225e001d299aa1f8cb8f9"
        ),
        install=install_support,
    ),
)
