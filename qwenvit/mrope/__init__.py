"""M-RoPE positions of a language model's text and vision tokens."""
