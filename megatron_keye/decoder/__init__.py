"""The decoder: Megatron-Core's transformer block with sparse attention."""
