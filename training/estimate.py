"""Estimates of the memory and time of a run, from its settings.

The time is that of the FLOPs at an assumed share of the GPU's peak or, for small models, the time in which the CPU can
launch the GPU's kernels. Expect errors of a factor of two.
"""

import shutil
from pathlib import Path

from torch import nn

from compute.ops import LOGITS_PER_CHUNK
from config import Config, InputError
from model import Transformer

# FLOP/s by GPU and precision: the peak of the data sheet times an assumed, not measured, share. A d_model of 512 is
# too small to keep tensor cores busy, which an A100 also uses in fp32 (TF32).
FLOPS_PER_SECOND = {
    "T4": {"fp32": 0.5 * 8.1e12, "fp16": 0.15 * 65e12},
    "A100": {"fp32": 0.15 * 156e12, "fp16": 0.15 * 312e12, "bf16": 0.15 * 312e12},
}
SECONDS_PER_BLOCK = 2e-3  # assumed, to launch the kernels of a block: forward, backward and update

# Resident memory of a process with PyTorch, and of the kernels that oneDNN keeps in bf16 (benchmarks/README.md).
CPU_PROCESS_BYTES, CPU_BF16_BYTES = 0.5e9, 2.5e9


SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps the batches that data loader workers hand over
PREFETCHED = 2  # batches per worker, PyTorch's default


def training_flops(model: Transformer, tokens: float) -> float:
    """FLOPs of training on this many source and target tokens: per weight of a linear layer, 2 forward and 4 backward.

    The products of queries, keys and values are left out: with a d_model of 512 and 30 tokens, they add 2%.
    """
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return 6.0 * weights * tokens


def estimated_seconds(
    config: Config, model: Transformer, steps: int, mean_length: float, gpu: str, precision: str
) -> float | None:
    """Training time without validation, for sentences of `mean_length` tokens; None for an unknown GPU."""
    speed = next((speeds.get(precision) for name, speeds in FLOPS_PER_SECOND.items() if name in gpu), None)
    if speed is None:
        return None
    tokens = config.batch_tokens or config.batch_size * mean_length
    passes = 2 if config.rdrop_alpha else 1
    computing = passes * training_flops(model, tokens) / speed
    launching = SECONDS_PER_BLOCK * (config.encoder_layers + config.decoder_layers)
    return steps * config.accumulation_steps * max(computing, launching)


def estimated_memory(config: Config, model: Transformer, device_type: str, precision: str) -> float:
    """Peak memory of training in bytes: allocated on a GPU; on a CPU, of the whole process.

    A parameter takes 16 bytes: weight, gradient and Adam's two moments in fp32. The EMA and a 16-bit copy are added.
    For the backward pass, each sublayer keeps its input in fp32, a dropout mask of one byte per value, and the inputs
    of its multiplications.
    """
    D, d_ff = config.d_model, config.d_ff
    p = 4 if precision == "fp32" else 2  # bytes per value in multiplications
    attention = (4 + 1 + 6 * p) * D  # normalized input, queries, keys, values, output of the heads (twice)
    feed_forward = (4 + 1 + p) * D + (2 * p + 1) * d_ff
    bytes_per_token = config.encoder_layers * (attention + feed_forward)
    bytes_per_token += config.decoder_layers * (2 * attention + feed_forward)
    tokens = config.batch_tokens or config.batch_size * config.seq_len  # at most, on either side
    passes = 2 if config.rdrop_alpha else 1
    bytes_per_parameter = 16 + (4 if config.ema_decay else 0) + (2 if precision != "fp32" else 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logits = min(tokens * model.projection_layer.proj.out_features, LOGITS_PER_CHUNK[device_type])
    memory = parameters * bytes_per_parameter + passes * tokens * bytes_per_token + 2 * p * logits
    if device_type == "cpu":
        memory += CPU_PROCESS_BYTES + (CPU_BF16_BYTES if precision == "bf16" else 0)
    return memory


def check_shared_memory(config: Config) -> None:
    """Raises InputError if /dev/shm is too small for the batches of data loader workers, as in a Docker container.

    A batch that does not fit is lost, and training would wait for it without end.
    """
    if not config.num_workers or not SHARED_MEMORY.is_dir():
        return
    tokens = config.batch_tokens or config.batch_size * config.seq_len
    batch = tokens * (5 * 8 + config.seq_len)  # bytes: five tensors of int64, and the decoder mask
    needed, free = config.num_workers * PREFETCHED * batch, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, --num-workers {config.num_workers} may need "
            f"{needed / 1e6:,.1f} MB; lower it, or give the container more (docker run --shm-size)"
        )
