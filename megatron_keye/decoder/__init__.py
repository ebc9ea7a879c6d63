"""Embeddings to logits: Megatron-Core's transformer block around our sparse attention."""
