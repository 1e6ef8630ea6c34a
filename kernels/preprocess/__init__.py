"""Pixels of pictures: from decoded bytes to the tower's input."""
