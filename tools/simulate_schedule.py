# SPDX-License-Identifier: Apache-2.0
"""Simulates the schedule on a mix of sample lengths: `megatron-keye simulate`.

The command is in megatron_keye/cli/simulate.py.
"""

import sys

from megatron_keye.cli.simulate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
