"""Lean layers compute what the stock ones do, gradients too, and keep less for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm

from lora_rlhf.base.lean_layers import lora_linear, make_norms_and_mlps_lean, rms_norm, swiglu

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("with_adapter", [True, False], ids=["adapter", "no adapter"])
def test_the_gradients_of_a_lora_linear_are_right(with_adapter: bool, with_bias: bool) -> None:
    x, w, a, b = randn(2, 3, 5), randn(4, 5), randn(2, 5), randn(4, 2)
    bias = randn(4) if with_bias else None
    inputs = [t.requires_grad_() for t in ([x, a, b] if with_adapter else [x])]

    def product(x: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, lambda: w, bias, (*adapter, 1.5) if adapter else None)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(product, inputs)
    expected = x @ w.T + (0 if bias is None else bias) + (1.5 * (x @ a.T) @ b.T if with_adapter else 0)
    torch.testing.assert_close(product(*inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(product(*inputs), expected)


def test_a_frozen_adapter_takes_no_gradient_and_passes_it_on() -> None:
    x, w, a, b = randn(3, 5).requires_grad_(), randn(4, 5), randn(2, 5), randn(4, 2)
    lora_linear(x, lambda: w, None, (a, b, 1.0)).sum().backward()
    torch.testing.assert_close(x.grad, (w + b @ a).sum(0).expand(3, 5))


def test_an_input_without_gradient_trains_the_adapter_alone() -> None:
    x, w, a, b = randn(3, 5), randn(4, 5), randn(2, 5).requires_grad_(), randn(4, 2).requires_grad_()
    lora_linear(x, lambda: w, None, (a, b, 1.0)).sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None


def test_the_weight_is_asked_for_twice_and_not_kept() -> None:
    asked = []

    def weight() -> torch.Tensor:
        asked.append(torch.ones(4, 5, dtype=torch.float64))
        return asked[-1]

    y = lora_linear(randn(3, 5).requires_grad_(), weight, None, None)
    below_the_view = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert len(asked) == 1 and not below_the_view.saved_tensors  # type: ignore[union-attr]
    y.sum().backward()
    assert len(asked) == 2


def test_the_gradients_of_norm_and_gate_are_right() -> None:
    w = randn(6)
    assert torch.autograd.gradcheck(swiglu, [randn(3, 6).requires_grad_(), randn(3, 6).requires_grad_()])
    x = randn(3, 6).float().requires_grad_()
    theirs = MistralRMSNorm(6, eps=1e-5)
    theirs.weight.data = w.float()
    upstream = randn(3, 6).float()
    (theirs(x) * upstream).sum().backward()
    expected, x.grad = x.grad, None
    ours = rms_norm(x, w.float(), 1e-5)
    (ours * upstream).sum().backward()
    torch.testing.assert_close(ours, theirs(x))
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stock_modules_made_lean_give_the_same_numbers(dtype: torch.dtype) -> None:
    config = MistralConfig(hidden_size=16, intermediate_size=24)
    block = nn.ModuleDict({"mlp": MistralMLP(config), "norm": MistralRMSNorm(16)}).to(dtype).requires_grad_(False)
    x = randn(2, 3, 16).to(dtype)
    before = block["mlp"](block["norm"](x))
    rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * before.abs().max().item()
    make_norms_and_mlps_lean(block)
    assert "forward" in block["mlp"].__dict__ and "forward" in block["norm"].__dict__
    torch.testing.assert_close(block["mlp"](block["norm"](x)), before, rtol=0, atol=rounding)
    with_grad = block["mlp"](block["norm"](x.requires_grad_()))
    torch.testing.assert_close(with_grad, before, rtol=0, atol=rounding)


def test_what_overflows_in_float16_shows_in_every_gradient() -> None:
    """A loss scale can only be halved where infinity arrives; a number that stopped at 65504 would be learnt from."""
    x, w, a, b = (randn(*shape).half() for shape in ((8, 6), (4, 6), (2, 6), (4, 2)))
    up, gate, weight = randn(8, 6).half(), randn(8, 6).half(), randn(6).half()
    for scale, overflows in ((1.0, False), (6e4, True)):
        inputs = [t.clone().requires_grad_() for t in (x, a, b, gate, up)]
        y = lora_linear(rms_norm(inputs[0], weight, 1e-5), lambda: w, None, (inputs[1], inputs[2], 1.5))
        y.backward(torch.full_like(y, scale))
        z = swiglu(inputs[3], inputs[4])
        z.backward(torch.full_like(z, scale))
        for tensor in inputs:
            assert tensor.grad is not None and bool(tensor.grad.isfinite().all()) != overflows


def test_a_forward_that_somebody_else_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = MistralRMSNorm(16)
    monkeypatch.setattr(MistralRMSNorm, "forward", lambda self, x: x)
    make_norms_and_mlps_lean(nn.ModuleList([norm]))
    assert "forward" not in norm.__dict__


def test_other_activations_and_other_modules_stay_as_they_are() -> None:
    mlp = MistralMLP(MistralConfig(hidden_size=16, intermediate_size=24, hidden_act="gelu"))
    model = nn.ModuleDict({"mlp": mlp, "norm": nn.LayerNorm(16)})
    make_norms_and_mlps_lean(model)
    assert "forward" not in mlp.__dict__ and "forward" not in model["norm"].__dict__


def test_a_model_may_add_to_the_output_in_place() -> None:
    """Falcon does, where attention and MLP stand side by side."""
    x = randn(2, 3, 5).requires_grad_()
    y = lora_linear(x, lambda: torch.ones(4, 5, dtype=torch.float64), None, None)
    y += 1
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 4.0))
