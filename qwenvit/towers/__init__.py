"""The towers as `nn.Module`s, and how weights get into them."""
