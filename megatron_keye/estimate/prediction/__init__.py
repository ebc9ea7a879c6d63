# SPDX-License-Identifier: Apache-2.0
"""The time of a step, predicted from the account of its work and a table of measured rates."""
