# SPDX-License-Identifier: Apache-2.0
"""Compares a checkpoint with another form of the model: `megatron-keye verify`.

The command is in megatron_keye/cli/verify.py.
"""

import sys

from megatron_keye.cli.verify import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
