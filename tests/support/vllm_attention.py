"""Stand-ins for the attention of vLLM's towers: the same names, arguments and layouts, in plain torch."""

from torch import nn

from support.rope_attention_cases import truth


class Linear(nn.Linear):
    """A linear that returns its output and a bias that was not added, as vLLM's do."""

    def forward(self, x):
        return super().forward(x), None


class Core(nn.Module):
    """What vLLM's `MMEncoderAttention` says of itself."""

    def __init__(self, head_dim):
        super().__init__()
        self.attn_backend, self.fp8_enabled, self.scale = "TORCH_SDPA", False, head_dim**-0.5


class Qwen2_5_VisionAttention(nn.Module):  # noqa: N801
    """A rank's part of the heads; its columns of the QKV product are those of Q, then K, then V."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.num_attention_heads_per_partition, self.hidden_size_per_attention_head = heads, head_dim
        self.qkv, self.proj = Linear(width, 3 * heads * head_dim), Linear(heads * head_dim, width)
        self.attn = Core(head_dim)

    def split(self, qkv):
        return qkv.unflatten(-1, (3, -1, self.hidden_size_per_attention_head)).unbind(2)

    def forward(self, x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen, sequence_lengths):
        assert max_seqlen is None
        assert sequence_lengths is None
        q, k, v = (part[:, 0] for part in self.split(self.qkv(x)[0]))
        y = truth(q, k, v, rotary_pos_emb_cos, rotary_pos_emb_sin, cu_seqlens.tolist())
        return self.proj(y.to(x.dtype).flatten(1)[:, None])[0]


class Qwen2VisionAttention(Qwen2_5_VisionAttention):
    """All heads' Q, then K, then V; `split_qkv` returns those of rank `rank`, as if it had gathered the columns."""

    rank = 0

    def __init__(self, width, heads, head_dim, ranks=1):
        super().__init__(width, heads, head_dim)
        self.qkv = Linear(width, 3 * ranks * heads * head_dim)

    def split_qkv(self, qkv):
        heads = self.num_attention_heads_per_partition
        return tuple(part[:, :, self.rank * heads :][:, :, :heads] for part in super().split(qkv))

    def split(self, qkv):
        return self.split_qkv(qkv)

    def forward(self, x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen=None):
        return super().forward(x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen, None)


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, **arguments):
        return x + self.attn(x, **arguments)


class Tower(nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, attentions))
