# SPDX-License-Identifier: Apache-2.0
"""Estimates of a run before it starts: parameters, memory, and the timeline of a step."""
