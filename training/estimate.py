"""Estimates of the memory, time and communication of a run, from its settings.

The time is that of the FLOPs at an assumed share of the GPU's peak or, for small models, the time in which the CPU can
launch the GPU's kernels. Expect errors of a factor of two.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from torch import nn

from compute.ops import LOGITS_PER_CHUNK
from config import Config, InputError
from model import Transformer


class GPU(NamedTuple):
    """What the estimates need to know of a GPU."""

    memory: float  # bytes
    bandwidth: float  # bytes/s that it sends to the other GPUs of its machine
    flops_per_second: dict[str, float]  # by precision


def tensor_core_gpu(memory: float, bandwidth: float, peak: float) -> GPU:
    """A GPU of compute capability 8 or higher, whose `peak` in bf16 is twice that in fp32 (TF32)."""
    return GPU(memory, bandwidth, {"fp32": 0.15 * peak / 2, "fp16": 0.15 * peak, "bf16": 0.15 * peak})


# From the data sheets: memory; bandwidth of PCIe 3.0 (T4) or NVLink in one direction; peak FLOP/s times an assumed, not
# measured, share. A d_model of 512 is too small to keep tensor cores busy.
GPUS = {
    "T4": GPU(16e9, 16e9, {"fp32": 0.5 * 8.1e12, "fp16": 0.15 * 65e12}),
    "A100-40": tensor_core_gpu(40e9, 300e9, 312e12),
    "A100-80": tensor_core_gpu(80e9, 300e9, 312e12),
    "H100": tensor_core_gpu(80e9, 450e9, 989e12),
    "H200": tensor_core_gpu(141e9, 450e9, 989e12),
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
    found = (gpu_.flops_per_second for name, gpu_ in GPUS.items() if name.partition("-")[0] in gpu)
    speed = next(found, {}).get(precision)
    return steps * computing_seconds(config, model, mean_length, speed) if speed else None


def computing_seconds(config: Config, model: Transformer, mean_length: float, flops_per_second: float) -> float:
    """Time of one optimizer step, without communication between processes."""
    tokens = config.batch_tokens or config.batch_size * mean_length
    passes = 2 if config.rdrop_alpha else 1
    computing = passes * training_flops(model, tokens) / flops_per_second
    launching = SECONDS_PER_BLOCK * (config.encoder_layers + config.decoder_layers)
    return config.accumulation_steps * max(computing, launching)


def estimated_memory(config: Config, model: Transformer, device_type: str, precision: str, processes: int = 1) -> float:
    """Peak memory of each process in training in bytes: allocated on a GPU; on a CPU, of the whole process."""
    memory = sum(memory_parts(config, model, device_type, precision, processes).values())
    if device_type == "cpu":
        memory += CPU_PROCESS_BYTES + (CPU_BF16_BYTES if precision == "bf16" else 0)
    return memory


class Parameters(NamedTuple):
    """Numbers of parameters: fully_shard gathers those of one block at a time, the others for a whole batch."""

    total: int
    block: int  # of the largest block
    others: int  # outside of the blocks: embeddings, projection, final LayerNorms


def count_by_place(model: Transformer) -> Parameters:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    blocks = [count(block) for block in (*model.encoder.layers, *model.decoder.layers)]
    return Parameters(count(model), max(blocks), count(model) - sum(blocks))


def communicated_bytes(config: Config, model: Transformer, processes: int) -> float:
    """Bytes that each process sends, and as many that it receives, in an optimizer step.

    With N processes, the sum of gradients (all-reduce) sends (N - 1) / N of them twice; gathering weights (all-gather)
    and summing and dividing gradients (reduce-scatter) send them once. With --shard, each batch needs the weights of
    the blocks for the forward and for the backward pass, the other weights once, and the gradients.
    """
    total, _, others = count_by_place(model)
    values = config.accumulation_steps * (3 * (total - others) + 2 * others) if config.shard else 2 * total
    return 4 * values * (processes - 1) / processes


def memory_parts(
    config: Config, model: Transformer, device_type: str, precision: str, processes: int = 1
) -> dict[str, float]:
    """Bytes of each process in training, without the process itself.

    A parameter takes 16 bytes: weight, gradient and Adam's two moments in fp32. The EMA and a 16-bit copy, kept for the
    backward pass, are added. DistributedDataParallel copies all gradients into buffers. With --shard, a process has a
    part of the parameters, and beside them the gathered ones: those outside of the blocks with their gradients, two
    blocks, because the next one is gathered early, and the gradients of a block, twice.
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
    logits = min(tokens * model.projection_layer.proj.out_features, LOGITS_PER_CHUNK[device_type])
    total, block, others = count_by_place(model)
    is_sharded = config.shard and processes > 1
    own = total / processes if is_sharded else total  # parameters of this process
    exchanged = 2 * others + 4 * block if is_sharded else total if processes > 1 else 0
    return {
        "weights": 4 * own,
        "gradients": 4 * own,
        "optimizer": 8 * own,
        "EMA": 4 * own if config.ema_decay else 0,
        "communication": 4 * exchanged,
        "16-bit copy": 2 * total if precision != "fp32" else 0,
        "activations": passes * tokens * bytes_per_token + 2 * p * logits,
    }


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
