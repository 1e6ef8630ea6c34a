"""The fast tower in CUDA graphs."""
