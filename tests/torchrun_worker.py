"""train.py as test_distributed.py starts it: in float64, with a wrong loss, or with a process that dies."""

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
if "USE_FLOAT64" in os.environ:
    torch.set_default_dtype(torch.float64)
if "AVERAGE_PER_PROCESS" in os.environ:  # a common mistake: the mean over processes of each one's mean loss per token
    distributed.sum_over_processes = lambda number: max(1, number) * distributed.world_size()

if "DIE_AT_STEP" in os.environ and distributed.rank() == 1:
    train_step = train.train_step

    def train_step_or_die(state, *args, **kwargs):
        if state.progress.step == int(os.environ["DIE_AT_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, *args, **kwargs)

    train.train_step = train_step_or_die

run_command(train.main)
