"""Memory, communication and speed of training on N GPUs, by arithmetic, without and with --shard.

    python benchmarks/several_gpus.py --gpus 8 --kind A100-40 -- --preset wmt14
    python benchmarks/several_gpus.py --gpus 16 --kind T4 --bandwidth 1.25      # machines with 10 Gbit/s between them
    torchrun --nproc-per-node 2 benchmarks/several_gpus.py --measure -- --preset multi30k   # beside a measurement

Flags after -- are those of train.py. --measure makes steps in N processes on a CPU and counts the bytes that they hold
and send (Linux). It counts all traffic of the loopback device; as root, `unshare -n sh -c "ip link set lo up; torchrun
…"` excludes that of other programs.
"""

import argparse
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from workload import SyntheticPairs, markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from presets import meta_model

from compute import distributed, sharding
from config import Config, InputError, run_command
from dataset import Batches
from model import Transformer
from train import parse_config, train_step
from training.batches import StepBatches
from training.estimate import GPU, GPUS, communicated_bytes, computing_seconds, count_by_place, memory_parts
from training.losses import TrainingLoss
from training.state import TrainingState

FORMS = {"without --shard": False, "--shard": True}
MEASURED_STEPS = 4


def chosen_gpu(arguments: argparse.Namespace) -> GPU:
    """The GPU of --kind, with the figures given instead of its own."""
    gpu = GPUS[arguments.kind]
    if arguments.teraflops:
        gpu = gpu._replace(flops_per_second=dict.fromkeys(gpu.flops_per_second, 1e12 * arguments.teraflops))
    own = {"memory": arguments.memory, "bandwidth": arguments.bandwidth}
    return gpu._replace(**{name: 1e9 * value for name, value in own.items() if value})


def chosen_precision(config: Config, gpu: GPU) -> str:
    """The precision of the config on this GPU; `auto` is bf16 or, without it, fp16. Raises InputError for others."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in gpu.flops_per_second else "fp16"
    if precision not in gpu.flops_per_second:
        raise InputError(f"no {precision} on this GPU; choose one of {', '.join(gpu.flops_per_second)}")
    return precision


def plan(config: Config, gpu: GPU, processes: int) -> str:
    """The table of one model on `processes` GPUs. Communication and computation are assumed not to overlap."""
    model = meta_model(config, (config.vocab_size, config.vocab_size))
    precision = chosen_precision(config, gpu)
    tokens = config.accumulation_steps * (config.batch_tokens or config.batch_size * config.seq_len)
    configs = [replace(config, shard=shard) for shard in FORMS.values()]
    parts = [memory_parts(each, model, "cuda", precision, processes) for each in configs]
    totals = [sum(part.values()) for part in parts]
    sent = [communicated_bytes(each, model, processes) for each in configs]
    computing = computing_seconds(config, model, config.seq_len, gpu.flops_per_second[precision])
    seconds = [computing + each / gpu.bandwidth for each in sent]
    rows = [[f"{name} (GB)", *(f"{part[name] / 1e9:.3g}" for part in parts)] for name in parts[0]]
    rows += [
        ["memory of a GPU (GB)", *(f"{each / 1e9:.3g}" for each in totals)],
        [f"fits into {gpu.memory / 1e9:.4g} GB", *("yes" if each < gpu.memory else "no" for each in totals)],
        ["sent by a GPU per step (GB)", *(f"{each / 1e9:.3g}" for each in sent)],
        ["seconds per step", *(f"{each:.3g}" for each in seconds)],
        ["of which communication", *(f"{each / gpu.bandwidth:.3g}" for each in sent)],
        ["target tokens/s, padding included", *(f"{processes * tokens / each:,.0f}" for each in seconds)],
    ]
    speed = f"send {gpu.bandwidth / 1e9:g} GB/s each and compute {gpu.flops_per_second[precision] / 1e12:.3g} TFLOP/s"
    line = f"{count_by_place(model).total:,} parameters, {precision}, {processes} GPUs that {speed}"
    return f"{line}\n\n{markdown_table(rows, ['', *FORMS])}"


# ---------------------------------------------------------------------------- measurement


def own_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors that this process holds."""
    return sum((t.to_local() if sharding.is_sharded(t) else t).nbytes for t in tensors)


def loopback_bytes() -> int:
    """Bytes sent through the loopback device since the machine started."""
    lines = Path("/proc/net/dev").read_text(encoding="utf8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def measure(config: Config) -> tuple[Transformer, dict[str, float]]:
    """Makes a few steps on synthetic text. Returns the model, and what each process holds and sends, on average."""
    vocab_size, device, found = config.vocab_size, torch.device("cpu"), {}
    state = TrainingState.create(config, vocab_size, vocab_size, device)
    loss_module = TrainingLoss(state.model.train(), config.label_smoothing, config.rdrop_alpha)
    if not state.is_sharded:
        loss_module = distributed.averaging_gradients(loss_module, device)
    parameters = list(state.model.parameters())
    state.optimizer.register_step_pre_hook(
        lambda *_: found.update(gradients=own_bytes([p.grad for p in parameters if p.grad is not None]))
    )
    pairs, processes = SyntheticPairs(10_000, vocab_size), distributed.world_size()
    batches = islice(Batches(pairs, config, epoch=0), distributed.rank(), None, processes)
    for i in range(1 + MEASURED_STEPS):
        if i == 1:  # after a first step, in which the processes connect
            distributed.gather(None)
            start = loopback_bytes()
        own = [pairs[next(batches)] for _ in range(config.accumulation_steps)]
        train_step(state, loss_module, StepBatches(own, 0, processes * len(own)), config.lr, config)
    distributed.gather(None)
    sent = (loopback_bytes() - start) / MEASURED_STEPS / processes
    moments = [each[name] for each in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found |= {"weights": own_bytes(parameters), "optimizer": own_bytes(moments)}
    found["EMA"] = own_bytes(list(state.ema_model.parameters())) if state.ema_model else 0
    everywhere = distributed.gather(found)
    return state.model, {name: sum(each[name] for each in everywhere) / processes for name in found} | {"sent": sent}


def comparison(config: Config) -> str:
    """The table of the arithmetic beside the measurement, in MB."""
    rows, processes = [], distributed.world_size()
    for form, shard in FORMS.items():
        own = replace(config, shard=shard, precision="fp32", seq_len=256)  # synthetic sentences have up to 201 tokens
        model, measured = measure(own)
        parts = memory_parts(own, model, "cpu", "fp32", processes)
        expected = {name: parts[name] for name in ("weights", "gradients", "optimizer", "EMA")}
        expected["sent"] = communicated_bytes(own, model, processes)
        if shard:  # gloo divides gradients after an all-reduce, which sends them once more than a reduce-scatter
            expected["sent"] += config.accumulation_steps * 4 * count_by_place(model).total * (1 - 1 / processes)
        for name, value in expected.items():
            label = "sent per step, with gloo" if name == "sent" else name
            rows.append([form, label, f"{value / 1e6:.3f}", f"{measured[name] / 1e6:.3f}"])
    return markdown_table(rows, ["", "MB per process", "arithmetic", "measured"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--kind", choices=list(GPUS), default="A100-80", help="kind of GPU (default: %(default)s)")
    parser.add_argument("--memory", type=float, help="its memory in GB, instead of that of the kind")
    parser.add_argument("--teraflops", type=float, help="TFLOP/s that training reaches, instead of 15%% of the peak")
    parser.add_argument("--bandwidth", type=float, help="GB/s that a GPU sends, instead of that within one machine")
    parser.add_argument("--measure", action="store_true", help="compare with a measurement; needs torchrun")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    arguments = parser.parse_args(argv)
    config = parse_config(arguments.flags)
    if arguments.gpus < 1:
        raise InputError(f"--gpus is {arguments.gpus}; give 1 or more")
    if not arguments.measure:
        print(plan(config, chosen_gpu(arguments), arguments.gpus))
        return
    if distributed.world_size() == 1:
        raise InputError("--measure needs several processes: torchrun --nproc-per-node 2 benchmarks/several_gpus.py …")
    with distributed.process_group(config.ddp_timeout):
        table = comparison(config)
    if distributed.is_first():
        print(table)


if __name__ == "__main__":
    run_command(main)
