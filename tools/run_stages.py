# SPDX-License-Identifier: Apache-2.0
"""Trains all stages of a model, each from the one before: `megatron-keye run_stages`.

The command is in megatron_keye/cli/run_stages.py.
"""

import sys

from megatron_keye.cli.run_stages import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
