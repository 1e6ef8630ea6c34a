"""Where patches are: positions, order and attention segments, computed from `grid_thw` alone."""
