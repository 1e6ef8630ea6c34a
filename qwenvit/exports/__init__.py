"""Embeddings in the forms that transformers, vLLM and SGLang take."""
