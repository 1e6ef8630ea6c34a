"""RoPE and attention within segments."""
