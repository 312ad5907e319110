"""Prometheus metrics of TwoTower engines beside vLLM's diffusion metrics (upstream: vllm/v1/metrics/loggers.py)."""

from typing import Any

from vllm_twotower.patches.registry import serves_two_tower


def _spec_decoding_cls(self: Any) -> type:
    """The class of metrics that a Prometheus logger makes: ours for a TwoTower engine, else vLLM's."""
    if serves_two_tower(self.vllm_config.model_config):
        from vllm_twotower.engine.metrics import TwoTowerProm

        return TwoTowerProm
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    return SpecDecodingProm


spec_decoding_cls = property(_spec_decoding_cls)
