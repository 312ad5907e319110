"""Inside vLLM's step: rows to towers, block sampling, scheduling, metrics."""
