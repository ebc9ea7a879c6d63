# SPDX-License-Identifier: Apache-2.0
"""The layouts of a run on some GPUs: which there are, which fit, which takes the least time."""
