"""vLLM's models with qwenvit in them: one module for each of vLLM's, which is all it imports of vLLM's models."""
