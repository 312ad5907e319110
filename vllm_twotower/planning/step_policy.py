"""Rules of an engine step that the engine and the simulator share."""

AUTO_PASSES_PER_STEP = 8
"""The most denoiser passes of a step with ``denoise_steps_per_engine_step: auto``: new requests wait for them."""


def worth_a_context_pass(num_finished: int, num_canvases: int) -> bool:
    """Whether finished blocks are enough for a step that runs the context tower for them alone, with
    ``commit: grouped``.

    A third of the canvases is near the optimum where a pass costs the same for few tokens as for many, weights being
    read once a pass, and a block takes about five: waiting costs canvases, passes cost weight reads.
    """
    return 3 * num_finished >= num_canvases
