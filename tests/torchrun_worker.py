"""train.py as test_distributed.py starts it: in float64, with a wrong loss, with a process that once dies or hangs."""

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

FAULTS = {"DIE_AT_STEP": signal.SIGKILL, "STOP_AT_STEP": signal.SIGSTOP}
train_step = train.train_step


def train_step_or_fault(state, *args, **kwargs):
    for name in FAULTS.keys() & os.environ.keys():
        if state.progress.step == int(os.environ[name]) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), FAULTS[name])
    return train_step(state, *args, **kwargs)


if distributed.rank() == 1:
    train.train_step = train_step_or_fault

run_command(train.main)
names = [(thread / "comm").read_text("utf8") for thread in Path("/proc/self/task").glob("*")]
sys.exit(any("gloo" in name for name in names))  # such a thread may abort the process when Python ends
