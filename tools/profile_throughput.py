"""Measures where a step's time goes: `megatron-keye profile`.

The command is in megatron_keye/cli/profile.py.
"""

import sys

from megatron_keye.cli.break_even import fit_break_even
from megatron_keye.cli.profile import main

__all__ = ["fit_break_even", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
