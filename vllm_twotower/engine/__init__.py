"""How a TwoTower runs inside vLLM: scheduler, per-request state, the passes of a step and what they decide."""
