"""Inputs, the fp64 truth, and the error measure for the tests of `qwenvit.ops.rope_attention`."""

import math
from contextlib import contextmanager
from itertools import pairwise

import torch

from qwenvit import ops
from support.errors import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIMS = (64, 72, 80)
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
"""Triton's interpreter cannot multiply bfloat16 matrices."""
DRIFTS = (0.3, 3, -40, 200)
"""For `packed_with_drift`: below and above the growth that a maximum allows, and beyond fp32's range."""


@contextmanager
def poisoned():
    """Fill tensors allocated inside with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def packed(tokens, heads, head_dim, dtype, device=DEVICE, outliers=True, seed=0):
    """Return random Q, K and V [tokens, heads, head_dim], views of a packed projection, some channels far larger."""
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device, generator=generator)
    if outliers:
        qkv[..., 3] *= 10
        qkv[:, 2, :, 5] *= 100
    return qkv.to(dtype).unbind(1)


def packed_with_drift(tokens, heads, head_dim, dtype, drift, device=DEVICE):
    """Return Q, K and V; scores rise by `drift` powers of two every 128 keys towards the first, and fall in odd rows.

    Attention on Hopper goes through the keys in this direction.
    """
    q, k, v = packed(tokens, heads, head_dim, torch.float32, device, outliers=False)
    rise = drift * torch.arange(tokens, 0, -1, device=device) / 128
    direction = 1 - 2 * (torch.arange(tokens, device=device) % 2)
    q[..., 0] = direction[:, None] * head_dim**0.5
    k[..., 0] = rise[:, None] * math.log(2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def angles(tokens, head_dim, device=DEVICE, half=None):
    """Return cosines and sines [tokens, head_dim] in fp32, or [tokens, head_dim / 2] in the dtype `half`."""
    position = torch.arange(tokens, device=device)[:, None] * 0.37
    angle = position / 10000 ** (torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    if half is not None:
        return angle.cos().to(half), angle.sin().to(half)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def boundaries(bounds):
    return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)


def rotate(x, cos, sin, interleaved):
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half].to(x.dtype), sin[:, None, :half].to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def truth(q, k, v, cos, sin, bounds, interleaved=False, scale=None, rotate_keys=True):
    """Return attention within segments in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    if cos is not None:
        q = rotate(q, cos, sin, interleaved)
        k = rotate(k, cos, sin, interleaved) if rotate_keys else k
    out = torch.empty_like(v)
    for start, end in pairwise(bounds):
        for i_head in range(q.shape[1]):
            scores = q[start:end, i_head] @ k[start:end, i_head].T * (scale or q.shape[-1] ** -0.5)
            out[start:end, i_head] = scores.softmax(-1) @ v[start:end, i_head]
    return out


def assert_close_to_truth(qkv, bounds, max_seqlen, interleaved=False, rotate=True, scale=None, half=None):
    """Assert that the kernel's error is at most 1.05 times that of plain torch.

    `angles` explains `half`. In fp32 a few rows with the largest scores dominate the error, and in a small input chance
    decides which implementation has the worse ones. There, on a GPU, the errors of seven more inputs with other signs
    are pooled.
    """
    q, draws = qkv[0], [qkv]
    if q.is_cuda and q.dtype == torch.float32 and len(q) < 2000:
        generator = torch.Generator("cuda").manual_seed(0)
        signs = (torch.randint(2, q.shape, device="cuda", generator=generator) * 2 - 1 for _ in range(3 * 7))
        draws += [tuple(x * sign for x, sign in zip(qkv, signs, strict=False)) for _ in range(7)]
    pooled = torch.tensor([errors(draw, bounds, max_seqlen, interleaved, rotate, scale, half) for draw in draws])
    ours, theirs = pooled.square().mean(0).sqrt().tolist()
    floor = 2**-21 if q.dtype == torch.float32 else 0.0  # a few ulps: with few tokens the errors differ by chance
    assert ours <= max(1.05 * theirs, floor), (ours, theirs)


def errors(qkv, bounds, max_seqlen, interleaved, rotate, scale, half):
    """Return the errors of the kernel and of plain torch, both run on NaN-filled memory."""
    q, k, v = qkv
    cos, sin = angles(len(q), q.shape[2], q.device, half) if rotate else (None, None)
    arguments = (q, k, v, cos, sin, boundaries(bounds), max_seqlen, scale, interleaved)
    right = truth(q, k, v, cos, sin, bounds, interleaved, scale)
    with poisoned():
        ours = ops.rope_attention(*arguments, impl="triton")
        theirs = ops.rope_attention(*arguments, impl="reference")
    assert ours.is_contiguous()
    assert (ours.shape, ours.dtype) == (q.shape, q.dtype)
    return error(ours, right), error(theirs, right)
