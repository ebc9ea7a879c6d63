# SPDX-License-Identifier: Apache-2.0
"""The decoder: Megatron-Core's transformer block with sparse attention."""
