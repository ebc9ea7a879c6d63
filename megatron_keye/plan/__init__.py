# SPDX-License-Identifier: Apache-2.0
"""The plan of a step, from sizes alone: which rank holds which tokens, encodes and sends what.

Needs only the standard library and numpy, so that planning tools start fast. Every rank, whatever
its device, computes the same plan without communication.
"""
