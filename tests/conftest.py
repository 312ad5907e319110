"""Set before anything imports torch: tiny models are fastest on one thread, and tests share the machine's cores."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

sys.path.insert(0, str(Path(__file__).parent))  # helper modules of this folder
