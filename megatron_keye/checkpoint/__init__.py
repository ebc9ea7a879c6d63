"""State to disk and back, on the same grid or another."""
