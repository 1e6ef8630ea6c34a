"""The operations of `qwenvit.ops` in plain torch: what each means, on any device, at no particular speed."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu_tanh", "quick_gelu", "gelu")


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """`[S, 3·H·D]` with Q and K rotated, in fp32 whatever their dtype; V as it was."""
    q_and_k, v = qkv.tensor_split([qkv.shape[1] // 3 * 2], dim=1)
    heads = q_and_k.unflatten(1, (2 * num_heads, -1)).float()
    half = heads.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = heads.unflatten(2, (half, 2)).unbind(3) if interleaved else heads.unflatten(2, (2, half)).unbind(2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=3 if interleaved else 2)
    return torch.cat((turned.flatten(1).to(qkv.dtype), v), dim=1)


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """`rotated`, in place."""
    return qkv.copy_(rotated(qkv, cos, sin, num_heads, interleaved))


def qkv_rope(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    interleaved: bool,
) -> Tensor:
    """Projection, then `rotated`."""
    return rotated(F.linear(hidden_states, weight, bias), cos, sin, num_heads, interleaved)


def activation(x: Tensor, act: str) -> Tensor:
    """`act` of each element."""
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def activation_(x: Tensor, act: str) -> Tensor:
    """`activation`, in place."""
    return x.copy_(activation(x, act))


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Projection, then `activation`."""
    return activation(F.linear(x, weight, bias), act)


def swiglu_pass(gate_up: Tensor) -> Tensor:
    """`[S, 2·I]`, gate and up in alternate columns -> silu(gate) · up, `[S, I]`."""
    gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2)
    return F.silu(gate) * up


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Projection to gate and up, then `swiglu_pass`."""
    return swiglu_pass(F.linear(x, weight, bias))
