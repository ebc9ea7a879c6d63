# SPDX-License-Identifier: Apache-2.0
"""Prepares samples for training: `megatron-keye prepare`.

The command is in megatron_keye/cli/prepare.py.
"""

import sys

from megatron_keye.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
