# SPDX-License-Identifier: Apache-2.0
"""Trains a recipe: `megatron-keye train` as a file that torchrun and srun start once per rank.

The command is in megatron_keye/cli/train.py.
"""

import sys

from megatron_keye.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
