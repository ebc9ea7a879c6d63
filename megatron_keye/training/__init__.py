# SPDX-License-Identifier: Apache-2.0
"""One training step, and the loop over steps."""
