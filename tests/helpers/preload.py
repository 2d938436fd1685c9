"""What every test process needs, imported once in the process that they are forked from.

Imports only: no tensor, no thread, no process group; see ``pool.context``.
"""

from __future__ import annotations

import os

# Read when torch, transformers and DeepSpeed are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

from sft_dist.runtime.quiet import quiet_libraries

quiet_libraries()

import deepspeed  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import sft_dist.train.run  # noqa: F401
from tests.helpers import cells  # noqa: F401
