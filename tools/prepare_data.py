"""Prepares samples for training, as a store of tokens: `megatron-keye prepare`.

The command is in megatron_keye/cli/prepare.py.
"""

import sys

from megatron_keye.cli.prepare import main
from megatron_keye.cli.sample_store import make_store

__all__ = ["main", "make_store"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
