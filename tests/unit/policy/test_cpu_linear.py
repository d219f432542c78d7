"""The faster fp32 linear layer is the same layer."""

import copy

import pytest
import torch
from torch import nn

from trace_async.policy import cpu_linear
from trace_async.policy.cpu_linear import FastLinear, accelerate_linears, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Whatever this CPU is: take the path that AMD CPUs take."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("rows", [1, 31, 32, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_exact_in_fp32(rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 48), torch.randn(70, 48)
    offset = torch.randn(70) if bias else None
    expected = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    torch.testing.assert_close(linear(x, weight, offset).double(), expected, atol=2e-5, rtol=1e-5)
    columns = torch.randn(48, rows).t()  # not contiguous
    torch.testing.assert_close(linear(columns, weight), columns @ weight.t(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (50, 48), (4, 20, 48)])
def test_gradients_equal_the_plain_layer(shape, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 64, bias=bias), nn.SiLU(), nn.Linear(64, 40, bias=bias))
    fast = copy.deepcopy(plain)
    accelerate_linears(fast)
    assert isinstance(fast[0], FastLinear)
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for model, given in zip((plain, fast), inputs, strict=True):
        out = model(given)
        assert out.shape == (*shape[:-1], 40)
        out.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-5, rtol=1e-4)
    for found, expected in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_other_precisions_take_the_usual_path():
    layer = nn.Linear(40, 40)
    accelerate_linears(layer)
    assert layer.double()(torch.randn(50, 40, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(50, 40)).dtype == torch.bfloat16
