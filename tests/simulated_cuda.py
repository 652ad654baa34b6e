"""A simulated CUDA device on a CPU-only PyTorch, to find what a GPU would refuse or wait for.

    with SimulatedCuda() as gpu:
        train_model(config)  # torch.cuda.is_available() is True; tensors on "cuda" are `CudaTensor`s

The values of a `CudaTensor` are in a CPU tensor, and CPU kernels compute with them, so results are those of a CPU. An
operation on a CPU tensor and a `CudaTensor` raises RuntimeError as on a GPU. Operations for which the host waits are
collected in `gpu.waits`: reading values (item, tolist, nonzero, copies to the CPU), and uploads that are not
asynchronous (blocking, or from memory that is not pinned).

Works through Python only: PyTorch's C++ code takes a `CudaTensor` for a CPU tensor, and every operator that gets one
calls `CudaTensor.__torch_dispatch__`. Memory, streams and CUDA's kernels are not simulated.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

ROOT = str(Path(__file__).resolve().parent.parent)
aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Operators whose result or its size depends on values, so that the host waits for them.
WAITING = {
    aten._local_scalar_dense.default,  # item, bool, int, float
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class CudaTensor(torch.Tensor):
    """A tensor on the simulated device; `values` is the CPU tensor with its values."""

    device, is_cuda, is_cpu = CUDA, True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        with torch.inference_mode(False):  # otherwise it could not be a view of a tensor created outside that mode
            self = torch.Tensor._make_wrapper_subclass(
                cls, values.size(), values.stride(), values.storage_offset(), dtype=values.dtype
            )
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (result := operator.decompose(*args, **kwargs)) is not NotImplemented:  # inference mode leaves it to us
            return result
        check(operator, args, kwargs)
        on_gpu = {id(t.values): t for t in tree_iter((args, kwargs)) if isinstance(t, CudaTensor)}

        def to_gpu(result):  # an operator in place returns its argument
            if not isinstance(result, torch.Tensor):
                return result
            return on_gpu[id(result)] if id(result) in on_gpu else CudaTensor(result)

        with torch.inference_mode(False), torch.no_grad():
            return tree_map(to_gpu, operator(*values_of(args), **values_of(kwargs)))

    def __deepcopy__(self, memo):
        copy = CudaTensor(self.values.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):
        record_wait("save")
        return self.values.__reduce_ex__(protocol)

    def tolist(self):
        record_wait("tolist")
        return self.values.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def values_of(arguments):
    return tree_map(lambda x: x.values if isinstance(x, CudaTensor) else x, arguments)


def check(operator, args, kwargs) -> None:
    """Raises RuntimeError if a GPU would refuse these arguments; records a wait if it would have to wait for them."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_cpu = [t for t in tensors if not isinstance(t, CudaTensor)]
    name = str(operator)
    if operator is aten.copy_.default:
        target, source = args[:2]
        record_copy(source, isinstance(target, CudaTensor), is_blocking=not (args[2:] or [False])[0])
    elif operator in INDEXING and isinstance(args[0], CudaTensor):
        if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            record_wait("boolean index")
        if any(t is not None and not isinstance(t, CudaTensor) for t in args[1]):
            record_wait("index on the CPU")
        on_cpu = [t for t in on_cpu if not any(t is index for index in args[1])]
    # Scalars may be on the CPU, except in kernels for lists of tensors, and except the one that is modified.
    takes_scalars = "_foreach_" not in name and "_fused_" not in name and "_amp_" not in name
    takes_scalars &= not (operator._schema.is_mutable and any(t is args[0] for t in on_cpu))
    if operator is not aten.copy_.default and any(t.dim() or not takes_scalars for t in on_cpu):
        raise RuntimeError(f"{name}: expected all tensors on cuda:0, but found one of shape {on_cpu[0].shape} on cpu")
    if operator in WAITING:
        record_wait(name)


def record_copy(source: torch.Tensor, to_gpu: bool, is_blocking: bool) -> None:
    from_gpu = isinstance(source, CudaTensor)
    if from_gpu and not to_gpu:
        record_wait("copy to the CPU")
    if to_gpu and not from_gpu and (is_blocking or not source.is_pinned()):
        record_wait("blocking upload" if is_blocking else "upload from memory that is not pinned")


def record_wait(what: str) -> None:
    """Notes a wait and the line of the project that caused it."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or not is_own(frame.f_code.co_filename)):
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "?"
    if SimulatedCuda.current:
        SimulatedCuda.current.waits.append(f"{where}: {what}")


def is_own(file: str) -> bool:
    return file.startswith(ROOT) and "site-packages" not in file


def is_cuda(device) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Devices(TorchFunctionMode):
    """Creates tensors on the simulated device and moves them to and from it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.moved(function, *args, **kwargs)
        if not is_cuda(kwargs.get("device")):
            return function(*args, **kwargs)
        created = function(*values_of(args), **{**values_of(kwargs), "device": "cpu"})
        if function in (torch.tensor, torch.as_tensor):
            record_copy(created, to_gpu=True, is_blocking=True)
        return CudaTensor(created)

    def moved(self, function, tensor, *args, copy=False, **kwargs):
        if function is not torch.Tensor.to:
            args = ("cuda" if function is torch.Tensor.cuda else "cpu", *args)
        if args and isinstance(args[0], torch.Tensor):  # .to(other)
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        to_gpu = is_cuda(device) if device else isinstance(tensor, CudaTensor)
        if to_gpu == isinstance(tensor, CudaTensor):
            return tensor.to(dtype or tensor.dtype, copy=copy)
        record_copy(tensor, to_gpu, not non_blocking)
        moved = values_of(tensor).detach().to(dtype or tensor.dtype, copy=True)
        return CudaTensor(moved) if to_gpu else moved


class SimulatedCuda(contextlib.ExitStack):
    """Context in which a CUDA device seems to be available."""

    current: "SimulatedCuda | None" = None

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        super().__init__()
        self.capability = capability
        self.waits: list[str] = []
        self.matmul_precision = torch.get_float32_matmul_precision()  # of fp32, as set within the context

    def __enter__(self) -> "SimulatedCuda":
        super().__enter__()
        pinned: dict[int, torch.UntypedStorage] = {}  # by address; kept alive, so that no address is used twice

        def pin(tensor, *_):
            storage = (copy := tensor.clone()).untyped_storage()
            pinned[storage.data_ptr()] = storage
            return copy

        group, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast.__init__

        def grouped(lists, *args):
            groups = group(lists, *args).items()
            return {(first_device(found[0]), dtype): found for (_, dtype), found in groups}

        def first_device(lists):
            return next(t.device for tensors in lists for t in tensors if t is not None)

        def autocast_on_cpu(self, device_type, *args, **kwargs):
            autocast(self, "cpu", *args, **kwargs)

        on_cpu = {name: getattr(torch, name) for name in ("is_autocast_enabled", "get_autocast_dtype")}
        replaced = {
            "torch.cuda": {
                "is_available": lambda: True,
                "device_count": lambda: 1,
                "current_device": lambda: 0,
                "get_device_name": lambda *_: "Simulated GPU",
                "get_device_capability": lambda *_: self.capability,
                "max_memory_allocated": lambda *_: 0,
                "is_current_stream_capturing": lambda: False,  # a CUDA build without a driver would raise
                "get_rng_state_all": lambda: [torch.get_rng_state()],
                "set_rng_state_all": lambda states: None,
            },
            "torch.accelerator": {"is_available": lambda: True, "current_accelerator": lambda *_, **__: None},
            "torch.Tensor": {
                "pin_memory": pin,
                "is_pinned": lambda tensor, *_: tensor.untyped_storage().data_ptr() in pinned,
            },
            "torch._C": {"_group_tensors_by_device_and_dtype": grouped},
            # The values are on the CPU, so autocast for CUDA is autocast for the CPU.
            "torch": {name: lambda _, function=function: function("cpu") for name, function in on_cpu.items()}
            | {"set_float32_matmul_precision": lambda name: setattr(self, "matmul_precision", name)},
            "torch.autocast": {"__init__": autocast_on_cpu},
        }
        for owner, attributes in replaced.items():
            for name, value in attributes.items():
                self.enter_context(mock.patch(f"{owner}.{name}", value))
        # nn.Module.to then replaces parameters in place, so that shared ones stay shared.
        self.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        self.enter_context(_Devices())
        self.callback(setattr, SimulatedCuda, "current", None)
        SimulatedCuda.current = self
        return self
