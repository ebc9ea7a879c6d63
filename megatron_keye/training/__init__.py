"""One step, and many of them."""
