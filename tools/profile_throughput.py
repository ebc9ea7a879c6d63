# SPDX-License-Identifier: Apache-2.0
"""Measures where a step's time goes: `megatron-keye profile`.

The command is in megatron_keye/cli/profile.py.
"""

import sys

from megatron_keye.cli.profile import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
