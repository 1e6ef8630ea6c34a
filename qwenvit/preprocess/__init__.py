"""Whatever a user holds to `pixel_values` and `grid_thw`."""
