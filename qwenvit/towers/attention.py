"""The attention layer of a Qwen-VL tower, built of the operations in `qwenvit.ops`."""

import torch
from torch import Tensor, nn

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.ops.attention import HEAD_DIMS
from qwenvit.ops.packing import pack_qkv_rows, packed_width, split_packed_qkv, unpack_qkv_rows
from qwenvit.towers.packed import Packed

MAX_WINDOW_TOKENS = 64
"""The attention kernel for windows takes segments of at most this many tokens, and rotates queries and keys itself."""


class VisionAttention(Packed):
    """QKV projection with 2-D RoPE, attention within segments, output projection; for inference.

    Parameters are `qkv.weight`, `qkv.bias`, `proj.weight` and `proj.bias`, as in the checkpoints' `blocks.N.attn`.
    `load_state_dict` takes and `state_dict` returns the checkpoints' rows. In memory `qkv` has the rows of
    `qwenvit.packing.pack_qkv`, in another order and with more of them for V at a head width of 72, so write to it only
    with `load_state_dict`. Parameters do not require gradients: the Triton kernels compute none.

    Args:
        hidden_size: C, channels of the hidden states.
        num_heads: H; C / H is one of 64, 72 and 80.
        separate_qkv: whether state dicts have `q`, `k` and `v` instead of `qkv`, as Qwen2.5-Omni's do.
        impl: implementation of the operations, see `qwenvit.ops`.
        device: where the parameters go.
        dtype: bfloat16, float16 or float32, of the parameters and the hidden states.

    Raises:
        ValueError: the kernels do not support the head width.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        separate_qkv: bool = False,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads or hidden_size // num_heads not in HEAD_DIMS:
            expected = f"num_heads times one of {HEAD_DIMS}"
            raise ValueError(f"hidden_size: expected {expected}, got {hidden_size} with num_heads={num_heads}")
        self.num_heads = num_heads
        self.separate_qkv = separate_qkv
        self.impl = impl
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, packed_width(num_heads, self.head_dim), device=device, dtype=dtype)
        self.proj = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
        self.requires_grad_(False)

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: `[S, C]`, contiguous.
            cos: `[S, C / H]` fp32, both halves of each row equal (`GridPlan.cos`).
            sin: `[S, C / H]` fp32, both halves of each row equal (`GridPlan.sin`).
            cu_seqlens: `[segments + 1]` int32, as for `qwenvit.ops.rope_attention` (`GridPlan.frames.cu_seqlens`).
            max_seqlen: tokens in the longest segment, if known; up to 64 selects the kernel for windows, which rounds
                otherwise than the one for long segments.

        Returns:
            `[S, C]` in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: an argument that the operations refuse.
        """
        y = self.project(hidden_states, cos, sin, max_seqlen)
        return self.project_output(self.attend(y, cos, sin, cu_seqlens, max_seqlen))

    def project(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, max_seqlen: int | None) -> Tensor:
        """Project `hidden_states` `[S, C]` to Q, K and V, `[S, packed]`; rotate Q and K unless segments are windows.

        This is the first step of `forward`; `attend` and `project_output` follow. A caller of the three steps can free
        each step's input before the next.
        """
        weight, bias = self.qkv.weight, self.qkv.bias
        if _are_windows(max_seqlen):
            return ops.linear(hidden_states, weight, bias, self.impl)
        return ops.qkv_rope(hidden_states, weight, bias, cos, sin, self.num_heads, impl=self.impl)

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        """Attend with what `project` returned, `[S, packed]` -> `[S, C]`: the second step of `forward`."""
        angles: tuple[Tensor | None, Tensor | None] = (cos, sin) if _are_windows(max_seqlen) else (None, None)
        q, k, v = split_packed_qkv(qkv, self.num_heads, self.head_dim)
        out = ops.rope_attention(q, k, v, *angles, cu_seqlens, max_seqlen, interleaved=True, impl=self.impl)
        return out.flatten(1)

    def project_output(self, y: Tensor) -> Tensor:
        """Project the heads' outputs, `[S, C]` -> `[S, C]`: the last step of `forward`."""
        return ops.linear(y, self.proj.weight, self.proj.bias, self.impl)

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Concatenate Q, K and V, make rotary pairs adjacent in Q and K, and pad heads of V."""
        expected = 3 * self.num_heads * self.head_dim
        for kind in ("weight", "bias"):
            parts = [f"{part}.{kind}" for part in "qkv"]
            if self.separate_qkv and all(part in tensors for part in parts):
                tensors[f"qkv.{kind}"] = torch.cat([tensors.pop(part) for part in parts])
            rows = tensors[f"qkv.{kind}"]
            if len(rows) != expected:
                raise ValueError(f"qkv.{kind}: expected {expected} rows, got {len(rows)}")
            tensors[f"qkv.{kind}"] = pack_qkv_rows(rows, self.num_heads)
        return tensors

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restore the checkpoints' rows, and split Q, K and V if `separate_qkv`."""
        rows = {
            kind: unpack_qkv_rows(tensors.pop(f"qkv.{kind}"), self.num_heads, self.head_dim)
            for kind in ("weight", "bias")
        }
        if self.separate_qkv:
            qkv = {f"{part}.{kind}": rows[kind].chunk(3)[i] for i, part in enumerate("qkv") for kind in rows}
        else:
            qkv = {f"qkv.{kind}": whole for kind, whole in rows.items()}
        return qkv | tensors  # names in the reference tower's order


def _are_windows(max_seqlen: int | None) -> bool:
    return max_seqlen is not None and max_seqlen <= MAX_WINDOW_TOKENS
