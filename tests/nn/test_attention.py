from __future__ import annotations

import math

import pytest
import torch

from ldm.nn import attention as attention_module
from ldm.nn.attention import GEGLU, Attention, PixelAttention, Transformer2D, to_map, to_tokens


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(
    layer: Attention, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k / sqrt(width of a head)) v, one head after the other."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for q_i, k_i, v_i in zip(*(part.chunk(layer.heads, dim=-1) for part in (q, k, v)), strict=True):
        scores = q_i @ k_i.mT / math.sqrt(q_i.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -math.inf)
        heads.append(scores.softmax(dim=-1) @ v_i)
    return layer.to_out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_a_context(heads: int, masked: bool) -> None:
    layer = Attention(12, heads, context_width=7).double()
    x, context = normal(2, 5, 12), normal(2, 4, 7, seed=1)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]]) if masked else None
    torch.testing.assert_close(layer(x, context, mask), by_hand(layer, x, context, mask))


def test_self_attention() -> None:
    layer = Attention(12, 2, bias=True).double()
    x = normal(2, 5, 12)
    torch.testing.assert_close(layer(x), by_hand(layer, x, x, None))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="12.*5"):
        Attention(12, 5)


# ---- queries, keys and values by one product


def products(layer: Attention, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of parameters and inputs; and how many linear products the forward pass took."""
    counted = 0

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal counted
            counted += function is torch.nn.functional.linear
            return function(*args, **(kwargs or {}))

    leaves = [x.detach().requires_grad_() for x in inputs]
    with Count():
        out = layer(*leaves)
    loss = (out.float() * normal(*out.shape, seed=9).float()).sum()
    return [out, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])], counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to_context", [False, True])
def test_one_product_is_three(to_context: bool, bias: bool, dtype: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = Attention(64, 4, context_width=48 if to_context else None, bias=bias).to(dtype)
    inputs = [normal(3, 40, 64).to(dtype), *([normal(3, 7, 48, seed=1).to(dtype)] if to_context else [])]
    expected, before = products(layer, *inputs)
    monkeypatch.setattr(attention_module, "_fused_qkv", True)
    found, after = products(layer, *inputs)
    assert (before, after) == (4, 3 if to_context else 2)
    for a, e in zip(found, expected, strict=True):
        worst = ((a - e).abs().max() / e.abs().max()).item()
        assert a.dtype == dtype
        assert worst < (1e-5 if dtype == torch.float32 else 2**-6), "two units in the last place of a bf16"


def test_a_layer_with_an_adapter_or_a_hook_is_called_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(attention_module, "_fused_qkv", True)
    x = normal(2, 5, 12)

    class LoRA(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.delta = base, torch.nn.Linear(12, 12, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.delta(x)

    def adapted(layer: Attention) -> None:
        layer.to_q = LoRA(layer.to_q)

    def hooked(layer: Attention) -> None:
        layer.to_v.register_forward_hook(lambda module, inputs, output: 2 * output)

    def replaced(layer: Attention) -> None:
        monkeypatch.setattr(layer.to_k, "forward", lambda x: 3 * x)

    for change in (adapted, hooked, replaced):
        torch.manual_seed(0)
        layer = Attention(12, 2).double()
        before = layer(x)
        change(layer)
        out = layer(x)
        torch.testing.assert_close(out, by_hand(layer, x, x, None))
        assert not torch.allclose(out, before)


def test_pixel_attention_adds_to_its_input() -> None:
    layer = PixelAttention(8, norm_groups=4, eps=1e-6).double()
    x = normal(2, 8, 3, 5)
    tokens = layer.group_norm(x).flatten(2).mT
    expected = x + by_hand(layer, tokens, tokens, None).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_geglu_is_exact() -> None:
    layer = GEGLU(3, 4).double()
    x = normal(2, 3)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(4, dim=-1)
    expected = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(layer(x), expected)


def test_tokens_of_channels_last_are_a_view() -> None:
    x = normal(2, 8, 3, 5).to(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.data_ptr() == x.data_ptr()
    assert torch.equal(tokens, x.flatten(2).mT)
    back = to_map(tokens, 3, 5)
    assert back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("linear_projection", [False, True])
def test_transformer_starts_as_the_identity(linear_projection: bool) -> None:
    layer = Transformer2D(8, 2, 2, context_dim=6, linear_projection=linear_projection, norm_groups=4).double()
    x, context = normal(2, 8, 3, 5), normal(2, 4, 6, seed=1)
    assert torch.equal(layer(x, context), x)
    torch.nn.init.normal_(layer.proj_out.weight)
    assert (layer(x, context) - x).abs().max() > 0.01


def test_linear_and_convolution_projections_are_the_same_computation() -> None:
    conv = Transformer2D(8, 1, 2, context_dim=6, norm_groups=4).double()
    linear = Transformer2D(8, 1, 2, context_dim=6, norm_groups=4, linear_projection=True).double()
    torch.nn.init.normal_(conv.proj_out.weight)
    state = conv.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        state[name] = state[name].flatten(1)
    linear.load_state_dict(state)
    x, context = normal(2, 8, 3, 5), normal(2, 4, 6, seed=1)
    torch.testing.assert_close(conv(x, context), linear(x, context))
