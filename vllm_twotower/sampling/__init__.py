"""How logits become tokens and canvases fill: pure functions of tensors, which know nothing of vLLM's engine."""
