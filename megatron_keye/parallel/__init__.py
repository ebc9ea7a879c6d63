"""Who computes: rank grids, process groups, and what travels between them."""
