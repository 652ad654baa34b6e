"""train.py as torchrun starts it in test_parallel.py: in float64, or with a fault built in."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from compute import distributed
from config import run_command

torch.set_num_threads(1)
if "DOUBLE" in os.environ:
    torch.set_default_dtype(torch.float64)
if "MEAN_OF_EACH_PROCESS" in os.environ:  # the usual mistake
    distributed.sum_over_processes = lambda number: max(1, number) * distributed.world_size()

if "DIE_AT_STEP" in os.environ and distributed.rank() == 1:
    step = train.train_step

    def last_step(state, *args, **kwargs):
        if state.progress.step == int(os.environ["DIE_AT_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, *args, **kwargs)

    train.train_step = last_step

run_command(train.main)
