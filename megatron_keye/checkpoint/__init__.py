"""Saves and loads state, on the same grid or another, and converts checkpoints."""
