"""What a run will take, before it runs: parameters, memory, and how a step plays out in time."""
