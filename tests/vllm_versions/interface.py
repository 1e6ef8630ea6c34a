"""What the plugin takes for granted of vLLM and its imports and overrides do not say: the checks read this."""

PLUGIN = "qwenvit.integrations.vllm"
MODELS = "vllm.model_executor.models"

VERSIONS = (
    "0.22.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0",
    "0.32.0", "0.33.0",
)  # fmt: skip
"""Releases to check; of each 0.x at least the last."""

ROOTS = {
    "vllm_config": "vllm.config:VllmConfig",
    "model_config": "vllm.config:ModelConfig",
    "platform": "vllm.platforms.interface:Platform",
    "attention": f"{MODELS}.qwen2_5_vl:Qwen2_5_VisionAttention",
    "attn": "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention",
}
"""Classes of vLLM's objects by the names that the plugin gives them; other types follow from vLLM's annotations."""

STAND_INS = {
    "options:OptionsReader": f"{MODELS}.config:VerifyAndUpdateConfig",
}
"""Classes of the plugin that vLLM calls in place of its own: they must have every public method of these."""

TOWER = "tower:VllmTower"
"""The class in place of `self.visual`: it must have all that a model of vLLM uses of it, and take its calls."""

ATTENTION = "attention:_RopeAttention"
"""The class whose `forward` replaces that of vLLM's classes of attention; it names what it needs of these."""
ATTENTION_OF = {
    "Qwen2VisionAttention": (f"{MODELS}.qwen2_vl", {"split_qkv"}),
    "Qwen2_5_VisionAttention": (f"{MODELS}.qwen2_5_vl", set()),
}
"""vLLM's classes of attention: the module of each, and what of `ATTENTION`'s attributes it alone has."""

GRAPH_METHODS = {
    "encoder_cudagraph_forward",
    "encoder_eager_forward",
    "get_encoder_cudagraph_budget_range",
    "get_encoder_cudagraph_config",
    "get_encoder_cudagraph_item_specs",
    "prepare_encoder_cudagraph_capture_inputs",
    "prepare_encoder_cudagraph_replay_buffers",
    "select_encoder_cudagraph_items",
}
"""Methods of a model that vLLM calls only with `cudagraph_mm_encoder`, which is off where `self.visual` is ours."""

OF_OTHER_TOWERS = {"config", "merge_kernel_size"}
"""What `run_dp_sharded_mrope_vision_model` uses of towers with `rope_type="rope_2d"`, which none of these has."""

CALLS = (
    ("vllm.plugins:load_general_plugins", "load_plugins_by_group"),
    ("vllm.config:VllmConfig.try_verify_and_update_config", "verify_and_update_config"),
    (f"{MODELS}.utils:AutoWeightsLoader._load_module", "load_weights"),
)
"""Functions of vLLM, and what each must call, or look up with `getattr`."""

CONSTANTS = (("vllm.plugins:DEFAULT_PLUGINS_GROUP", "vllm.general_plugins"),)
"""Constants of vLLM and their values."""

FIELDS = (("vllm.config:VllmConfig", "additional_config"),)
"""Attributes of vLLM's classes that users of the plugin set."""
