# SPDX-License-Identifier: Apache-2.0
"""Records of sample files: JSON lines, one JSON list, or parquet, by number and in blocks."""
