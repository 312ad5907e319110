"""How a TwoTower runs inside vLLM: configuration, per-request state, the step plan and the block sampler."""
