"""`accel:0`, `accel:1`, …: devices that compute on the CPU and refuse what a GPU refuses, operations on tensors of
several devices. For machines without a GPU; import it in a process of its own, since it adds a backend to torch."""

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("accel", _Backend())


class AccelTensor(torch.Tensor):
    """Says that it lies on `device`; its values lie in `held`, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "AccelTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        # By this nn.Module.to knows that it may swap parameters, which keeps tied ones tied.
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], device: torch.device, _size: Any, _stride: Any) -> Any:
        return AccelTensor(parts["held"], device)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Inside, `accel` devices can be named, in this thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    device = _device_of(func, tensors, kwargs.get("device"))
    held = [leaf.held if isinstance(leaf, AccelTensor) else leaf for leaf in leaves]
    inner_args, inner_kwargs = pytree.tree_unflatten(held, structure)
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    # What an operation in place gives back is the tensor that it was given.
    given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, AccelTensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or device.type == "cpu":
            return value
        return given[id(value)] if id(value) in given else AccelTensor(value, device)

    return pytree.tree_map(outer, result)


def _device_of(func: Any, tensors: list[torch.Tensor], wanted: torch.device | None) -> torch.device:
    """Where the result lies. RuntimeError when the operands lie on several devices; as on a GPU, a number may come
    from the CPU and a copy may cross over."""
    if func is torch.ops.aten.copy_.default:
        return tensors[0].device
    if wanted is not None:
        return torch.device(wanted)
    if func is torch.ops.aten._to_copy.default:
        return tensors[0].device
    found = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(found) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, found))}")
    return found.pop() if found else torch.device("cpu")
