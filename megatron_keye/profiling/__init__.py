# SPDX-License-Identifier: Apache-2.0
"""What a profiled run shows: where its time and its memory go. Reads files, runs nothing."""
