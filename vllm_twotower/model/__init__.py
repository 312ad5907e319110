"""The vLLM model class and its two towers."""
