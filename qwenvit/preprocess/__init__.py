"""Preprocessing: images and videos to `pixel_values` and `grid_thw`."""
