"""Measures where a step's time goes: `megatron-keye profile`.

The command is in megatron_keye/cli/profile.py.
"""

import sys

from megatron_keye.cli.profile import main
from megatron_keye.cli.vision_fit import fit_break_even

__all__ = ["fit_break_even", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
