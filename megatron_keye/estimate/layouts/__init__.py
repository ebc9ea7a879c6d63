"""The layouts of a run on some GPUs: which there are, which fit, and which takes the least time."""
