"""The model as vLLM runs it: towers, time conditioning, weights."""
