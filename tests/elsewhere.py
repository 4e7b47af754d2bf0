"""Tensors that claim to be on a GPU and compute on the CPU, for tests where there is none.

    with pretended_gpu(monkeypatch) as gpu:
        script.main([..., "--device", "cuda"])
    gpu.waits                 how often the CPU had to wait for the device, by operation
    gpu.places                the same by the line of this project that asked for it

Every operation fails that would fail on a GPU: tensors of two devices in one operation, numpy() of
a tensor that is not on the CPU, and arithmetic or indexing with uint16, which CUDA does not have.
The CPU waits for what it reads of the device, and for all that it sends there: torch waits until
the device has come so far as to take it, unless it is sent from pinned memory with non_blocking.
Nothing is said about speed, or about kernels that exist.

C++ is told that a tensor is on "meta", a device that needs nothing installed,
and Python that it is on "cuda".
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parents[1]
CUDA, STAND_IN = torch.device("cuda:0"), torch.device("meta")
aten = torch.ops.aten
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
# What CUDA does with unsigned integers of more than 8 bits: move, look at, and no more.
MOVES = {
    *("_to_copy", "copy_", "clone", "detach", "alias", "view", "_unsafe_view", "reshape", "select"),
    *("slice", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "unbind", "split"),
    *("as_strided", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("unfold", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "_reshape_alias", "movedim"),
}
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}
WAITS |= {"_unique2", "unique_consecutive", "bincount"}
CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # CUDA takes these


class Elsewhere(torch.Tensor):
    """A tensor on the device that is not there."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=STAND_IN,
            requires_grad=False,
        )
        made.held = real
        return made

    def __init__(self, real: torch.Tensor):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In files as a tensor of the CPU, which is what map_location="cpu" makes of a GPU's."""
        return self.held.detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, None)


def held_by(x: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument without the pretence; its tensors are appended to the list. (torch's own tree_map
    takes longer than the operations of a tiny run.)"""
    if isinstance(x, torch.Tensor):
        tensors.append(x)
        return x.held if isinstance(x, Elsewhere) else x
    if type(x) in (list, tuple):
        return type(x)([held_by(part, tensors) for part in x])
    return x


def device_of(x: Any) -> torch.device | None:
    """Where a factory's argument says, None for no device."""
    return torch.device(x) if isinstance(x, (str, torch.device)) else None


def is_there(device: torch.device | None) -> bool:
    return device is not None and device.type in (CUDA.type, STAND_IN.type)


def compute(func: Any, args: Any, kwargs: dict[str, Any], gpu: PretendedGpu | None) -> Any:
    """An operation, as the device would do it."""
    name = func.overloadpacket.__name__
    tensors: list[torch.Tensor] = []
    plain_args = held_by(tuple(args), tensors)
    plain = {key: held_by(x, tensors) for key, x in kwargs.items()}
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    to = device_of(kwargs.get("device"))
    if any(x.is_meta and not isinstance(x, Elsewhere) for x in tensors):
        raise RuntimeError(f"{name}: a tensor without data")
    if there:
        check(name, args, tensors, there)
    if to is not None:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    plain.pop("non_blocking", None)
    found = func(*plain_args, **plain)
    lands = is_there(to) if to is not None else bool(there)
    if name == "copy_":
        lands = isinstance(args[0], Elsewhere)
    if gpu is not None and (there or lands):
        gpu.count(name, args, kwargs, lands)
    if not lands or name in ("_local_scalar_dense", "is_nonzero", "equal"):
        return found
    if name == "_to_copy" and not there and found is args[0]:
        found = found.clone()
    if isinstance(found, torch.Tensor):
        wrapped = Elsewhere(found)
    else:
        wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def check(name: str, args: Any, tensors: list[torch.Tensor], there: list[Elsewhere]) -> None:
    """RuntimeError for what a GPU refuses."""
    numbers_too = name in ("cat", "stack")  # elsewhere the CPU's numbers go along
    here = [x for x in tensors if not isinstance(x, Elsewhere) and (x.dim() or numbers_too)]
    moves = name in ("copy_", "_to_copy")
    indexes = name in CPU_INDICES and isinstance(args[0], Elsewhere)
    if indexes and name != "index":
        here = [x for x in here if x is args[2]]  # values are where the tensor is
    elif indexes:
        here = []
    if here and not moves:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{name}: tensors of the CPU {shapes} and of cuda")
    if name not in MOVES and any(x.dtype in UNSIGNED for x in there):
        raise NotImplementedError(f'"{name}_cuda" not implemented for unsigned integers')


def sends(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy to the device holds up the CPU."""
    source = args[1] if name == "copy_" else args[0]
    if isinstance(source, Elsewhere):
        return False
    is_free = getattr(source, "is_pinned_here", False)
    waits = not kwargs.get("non_blocking", name == "copy_" and args[2:3] == (True,))
    return waits or not is_free


def line_of_ours() -> str:
    """Which line of a script, of the harness or of the worlds is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inner = path.relative_to(ROOT).parts if ROOT in path.parents else ("tests",)
        if inner[0] not in ("tests", ".venv"):
            return f"{'/'.join(inner)}:{frame.f_lineno}"
        frame = frame.f_back
    return "tests"


class PretendedGpu(TorchDispatchMode):
    """Makes tensors elsewhere where they are asked for, and counts waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def count(self, name: str, args: Any, kwargs: dict[str, Any], lands: bool) -> None:
        """One more wait, if the CPU needs what the device computes, or sends it something."""
        masks = name in CPU_INDICES and any(
            isinstance(x, Elsewhere) and x.dtype in (torch.bool, torch.uint8)
            for x in args[1]
            if x is not None
        )
        copies = name in ("_to_copy", "copy_")
        if name in WAITS or masks or (copies and not lands):
            self.wait(name)
        elif copies and sends(name, args, kwargs):
            self.wait("send")

    def wait(self, name: str) -> None:
        self.waits[name] += 1
        self.places[line_of_ours()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, self)


def with_index(x: Any) -> Any:
    """C++ would ask the driver which of the GPUs "cuda" is."""
    if not isinstance(x, (str, torch.device)):
        return x
    return CUDA if str(x) == "cuda" else x


def taken_along(index: Any) -> Any:
    """An index on the device; C++ would move its parts where there is no data."""
    if isinstance(index, tuple):
        return tuple(map(taken_along, index))
    if isinstance(index, list):
        index = torch.tensor(index)
    here = isinstance(index, torch.Tensor) and not isinstance(index, Elsewhere)
    return index.to(CUDA) if here and index.dim() else index


class Claims(TorchFunctionMode):
    """What C++ refuses of tensors that are not quite one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.__format__) and isinstance(
            args[0], Elsewhere
        ):
            return func(args[0].cpu(), *args[1:])
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(with_index, (args, kwargs or {}))
        indexes = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if indexes and isinstance(args[0], Elsewhere):
            args = (args[0], taken_along(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and is_there(device_of(kwargs.get("device"))):
            return func(*args, **kwargs | {"device": "cpu"}).to(CUDA)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(CUDA)
        if func is torch.Tensor.pin_memory:
            assert not isinstance(args[0], Elsewhere), "only memory of the CPU can be pinned"
            x = args[0]  # copied with its strides, so that what expand() makes is refused
            pinned = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x)
            pinned.is_pinned_here = True
            return pinned
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu(monkeypatch: Any) -> Iterator[PretendedGpu]:
    """A GPU that torch believes in."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    gpu = PretendedGpu()
    with Claims(), gpu:
        yield gpu
