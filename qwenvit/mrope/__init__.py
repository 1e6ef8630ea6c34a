"""M-RoPE: the positions of a language model's text and vision tokens."""
