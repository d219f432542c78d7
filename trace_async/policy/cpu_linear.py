"""Run fp32 linear layers at the CPU's full width.

PyTorch multiplies fp32 matrices with MKL, which takes its narrow (AVX2) kernels on AMD CPUs. oneDNN also comes with
PyTorch and uses AVX-512 there, at the same precision. Measured on a Zen 5 core with 64 and more rows, it takes 0.55 of
the time forward, and 0.45 forward and backward. On Intel both are alike, so nothing is changed there.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With fewer rows the overhead of the call (10 µs) is larger than what it saves.
MIN_ROWS = 32


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512."""
    cpu_info = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu_info.is_file()
        and "AuthenticAMD" in cpu_info.read_text()
    )


def round_rows(count: int) -> int:
    """Round `count` up to the next of sixteen sizes per octave, which adds at most 6 %.

    oneDNN and compiled kernels keep something for every number of rows that they have seen. With ever new sizes this
    would take ever more memory, and time to make.
    """
    step = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`, [rows, in] · [out, in]ᵀ, without gradients."""
    if len(x) < MIN_ROWS or x.dtype != torch.float32 or x.device.type != "cpu" or not onednn_is_faster():
        return F.linear(x, weight, bias)
    num_rows, padding = len(x), round_rows(len(x)) - len(x)
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result[:num_rows]


class _LinearFunction(torch.autograd.Function):
    """Gives `linear` a gradient, which it computes by `linear` too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(dim=0) if ctx.has_bias else None


class FastLinear(nn.Linear):
    """An `nn.Linear` that computes through `linear`, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        flat: Tensor = _LinearFunction.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return flat.view(*x.shape[:-1], -1)


def accelerate_linears(model: nn.Module) -> None:
    """Turn all plain `nn.Linear` of a model into FastLinear, on machines where that is faster.

    Weights and names stay as they are, since only the class of the modules changes.
    """
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:  # not a subclass, which may have a forward of its own
            module.__class__ = FastLinear
