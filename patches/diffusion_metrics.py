"""Prometheus metrics of TwoTower engines beside vLLM's diffusion metrics (upstream: vllm/v1/metrics/loggers.py)."""

from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, replace, serves_two_tower

SPEC_DECODING_CLS = "vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls"
METRICS = "vllm.v1.spec_decode.metrics"


def spec_decoding_cls(self: Any) -> type:
    """The class of metrics that a Prometheus logger makes: ours for a TwoTower engine, else vLLM's."""
    if serves_two_tower(self.vllm_config.model_config):
        from vllm_twotower.engine.metrics import TwoTowerProm

        return TwoTowerProm
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    return SpecDecodingProm


PATCHES = (
    Patch(
        name="diffusion-metrics",
        target=SPEC_DECODING_CLS,
        what="PrometheusStatLogger makes vllm_twotower.engine.metrics.TwoTowerProm if the engine serves TwoTower.",
        why="vLLM has no metrics of context passes and finished blocks, and a logger of our own would have to be "
        "named by every program that builds an engine.",
        upstream="not reported",
        remove_when="a scheduler can send statistics of its own, and a plugin can add Prometheus metrics for them",
        applies_when=everywhere,
        sources=(f"{METRICS}:SpecDecodingProm", f"{METRICS}:SpecDecodingStats"),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "fc923bc5e5aa4dfaa924dfdb1e102c5cf99b4c716250a2d48c374b62451aa21d"
        ),
        install=lambda: replace(SPEC_DECODING_CLS, property(spec_decoding_cls)),
    ),
)
