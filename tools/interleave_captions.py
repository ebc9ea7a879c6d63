# SPDX-License-Identifier: Apache-2.0
"""Cuts captioned videos into pieces with captions between: `megatron-keye interleave`.

The command is in megatron_keye/cli/interleave.py.
"""

import sys

from megatron_keye.cli.interleave import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
