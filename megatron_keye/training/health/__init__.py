# SPDX-License-Identifier: Apache-2.0
"""Healthy numbers: bad steps are found before they change anything, told, and dealt with."""
