"""Dense features: maps of chosen layers, attention maps, and pictures of them."""
