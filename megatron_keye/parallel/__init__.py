# SPDX-License-Identifier: Apache-2.0
"""Process groups of both grids, the schedule of a step, and the transport of features."""
