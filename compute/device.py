"""Choice of device and precision; memory management."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import nn

from config import InputError, counted

# Number of parameters from which `auto` selects bf16 on a CPU. Relative to fp32, a training step in bf16 takes 0.5 of
# the time with the base model (49 million parameters), 0.64 with the Multi30k model (2.6 million) and 0.75 with the toy
# model (0.8 million), which stays in fp32 so that its runs do not depend on the CPU (benchmarks/README.md).
BF16_MIN_PARAMETERS = 2_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_device(name: str = "auto") -> torch.device:
    """The device of this name; `auto` is CUDA if available, then Apple's MPS, then the CPU.

    Raises InputError for an unknown or unavailable device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(candidate for candidate, is_available in available.items() if is_available)
    if name not in available:
        raise InputError(f"no device {name!r}; choose one of auto, {', '.join(available)}")
    if not available[name]:
        raise InputError(f"no {name} device on this machine; use --device auto")
    if name == "cuda":
        # cuDNN's attention prepares itself for every new shape, and its gradient is NaN for some masks (PyTorch 2.13).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """A description of the device, such as "NVIDIA A100-SXM4-40GB" or "8 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return counted(torch.get_num_threads(), "thread") if device.type == "cpu" else "Apple GPU"


def runs_asynchronously(device: torch.device) -> bool:
    """Whether kernels are queued, so that reading a tensor's value makes the host wait for all earlier ones."""
    return device.type == "cuda"


# ---------------------------------------------------------------------------- precision


def choose_precision(requested: str, device: torch.device, model: nn.Module) -> str:
    """fp32, bf16 or fp16. `auto` is bf16 if the device supports it natively and, on a CPU, the model is large enough.

    GPUs with fp16 but not bf16 tensor cores (compute capability 7, such as a T4) get fp16, Apple GPUs fp32. Raises
    InputError for an unknown precision.
    """
    if requested not in ("auto", *DTYPES):
        raise InputError(f"no precision {requested!r}; choose one of auto, {', '.join(DTYPES)}")
    if requested != "auto":
        return requested
    if device.type == "cuda":
        capability, _ = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= 8 else "fp16" if capability == 7 else "fp32"
    is_large = sum(p.numel() for p in model.parameters()) >= BF16_MIN_PARAMETERS
    return "bf16" if device.type == "cpu" and is_large and cpu_supports_bf16() else "fp32"


def cpu_supports_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing from the oldest supported PyTorch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix multiplications run in bf16 or fp16 if that is the precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def allow_tf32(device: torch.device) -> None:
    """On a GPU, makes fp32 matrix multiplications use tensor cores, which read 10 of the 23 bits of the mantissa."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


class LossScaler(torch.amp.GradScaler):
    """In fp16, scales the loss so that small gradients do not underflow (Micikevicius et al., 2018, section 3.2).

    A step with an overflow halves the scale; 2,000 steps without one double it. In other precisions it does nothing.
    """

    MIN_SCALE = 1.0  # gradients that overflow at this scale are too large in themselves

    def __init__(self, device: torch.device, precision: str):
        super().__init__(device.type, enabled=precision == "fp16")
        self.skipped_steps = 0  # because of an overflow

    def state_dict(self) -> dict:
        return {**super().state_dict(), "skipped_steps": self.skipped_steps} if self.is_enabled() else {}

    def load_state_dict(self, state: dict) -> None:
        """Restores a saved state; that of another precision is empty and has no effect."""
        if self.is_enabled() and state:
            super().load_state_dict(state)
            self.skipped_steps = state["skipped_steps"]


# ---------------------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory of freed large tensors instead of returning it to the system.

    Otherwise each large tensor is mapped and faulted in page by page. On a CPU this speeds up beam search (beam 5) by a
    factor of 1.4 and a training step of the Multi30k model by 1.15. No effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):  # older versions allow 32 MiB at most
            mallopt(trim_threshold, 1 << 30)


@contextlib.contextmanager
def explained_out_of_memory(batch: str, remedy: str) -> Iterator[None]:
    """Turns a GPU's out-of-memory error into an InputError that describes the batch."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory in a batch of {batch}; {remedy}") from None


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident on a CPU; 0 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
