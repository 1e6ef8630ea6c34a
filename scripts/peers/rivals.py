"""The rivals of `bench_e2e.py`: their names, and the text that says how each one runs.

`transformers_towers.transformers_rivals` and `timm_tower` build them; `e2e.model_bench.ModelBench` collects them.
"""

SDPA, TIMM = "transformers sdpa", "timm"
RIVAL_NAMES = {"sdpa": SDPA, "fa2": "transformers FA2", "fa3": "transformers FA3", "fa4": "transformers FA4",
               "compiled": "transformers compiled", "timm": TIMM}  # fmt: skip
"""By the word that `--rivals` takes."""
HOW_RIVALS_RUN = (
    "transformers: its tower in eager mode, `tower(pixel_values, grid_thw)`; FA2 is "
    "`torch.nn.attention.varlen.varlen_attn`, FA3 is `_vllm_fa3_C.fwd`, FA4 is "
    "`flash_attn.cute.flash_attn_varlen_func`, each as an attention function named `flash_…`. compiled: "
    "`torch.compile(tower, fullgraph=True, dynamic=True)` with the attention named as a custom operation, positions, "
    "`cu_seqlens` and `max_seqlen` computed before; + graph: the same in a CUDA graph of exactly this input, which "
    "lies where the graph reads it. timm: `qwen3_vit_*_enc` (no DeepStack, one image), each block compiled for this "
    "size, in a CUDA graph. vLLM: its tower, timed in another process on the same machine, its outputs compared with "
    "those of its eager mode alone; + graph: the faster of a CUDA graph of exactly this input, replayed without a copy "
    "of inputs or outputs, and vLLM's own graph manager."
)
