"""Simulated tokens/s of mask diffusion over autoregression, by the most denoiser passes of an engine step.

The released model on one ideal device, as ``vllm-twotower plan`` has it; nothing is measured:

    python benchmarks/passes_per_step.py --hardware H200
"""

from __future__ import annotations

import argparse

from vllm_twotower.architecture import TwoTowerConfig
from vllm_twotower.planning.cost_model import CostModel
from vllm_twotower.planning.hardware import DEVICES
from vllm_twotower.planning.released import RELEASED_CONFIG
from vllm_twotower.planning.simulator import Traffic, simulate
from vllm_twotower.planning.texts import MEAN_PASSES, steps_of_text

LIMITS = (1, 2, 4, "auto")


def main() -> None:
    """Simulates and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", choices=DEVICES, default="H200")
    parser.add_argument("--text", choices=MEAN_PASSES, default="arithmetic")
    parser.add_argument("--open", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    args = parser.parse_args()

    model = CostModel(TwoTowerConfig.from_dict(RELEASED_CONFIG), DEVICES[args.hardware])
    names = [f"{limit} a step" if limit != "auto" else limit for limit in LIMITS]
    print(f"| open requests | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for num_open in args.open:
        traffic = Traffic(num_open, steps_of_text(args.text), prompt_tokens=512, output_blocks=16)
        length = {"warm_up_requests": num_open, "measured_requests": max(48, num_open)}
        ar = simulate(model, traffic, "ar", **length).tokens_per_second
        ratios = [simulate(model, traffic, "mask_diffusion", passes_per_step=limit, **length) for limit in LIMITS]
        figures = " | ".join(f"{result.tokens_per_second / ar:.2f}" for result in ratios)
        print(f"| {num_open} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
