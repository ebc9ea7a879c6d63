# SPDX-License-Identifier: Apache-2.0
"""Saves and loads state, on the same grid or another, and converts checkpoints."""
