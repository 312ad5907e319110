"""Rules of an engine step that the engine and the simulator share."""

AUTO_PASSES_PER_STEP = 8
"""The most denoiser passes of a step with ``denoise_steps_per_engine_step: auto``: new requests wait for them."""
