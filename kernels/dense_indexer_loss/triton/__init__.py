# SPDX-License-Identifier: Apache-2.0
"""The dense indexer loss in Triton: value and gradients of a chunk of rows at a time."""
