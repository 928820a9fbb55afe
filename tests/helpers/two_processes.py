"""The beginning of a command that runs in two processes of one thread."""

from __future__ import annotations

import os
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
