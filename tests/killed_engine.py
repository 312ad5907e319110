"""An offline batch whose engine is killed: python killed_engine.py MODEL. Ends with the batch's error."""

from __future__ import annotations

import sys
import threading
import time

import psutil


def kill_engine() -> None:
    """Kills the engine's process in the middle of the batch."""
    time.sleep(1)
    [engine] = [p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline())]
    engine.kill()


if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], dtype="float32", max_model_len=1024, kv_cache_memory_bytes=64 << 20)
    threading.Thread(target=kill_engine).start()
    while True:
        llm.generate(["a"] * 8, SamplingParams(temperature=0, max_tokens=900, ignore_eos=True), use_tqdm=False)
