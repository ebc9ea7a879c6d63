# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints from and to the released (Hugging Face) form: `megatron-keye convert`.

The command is in megatron_keye/cli/convert.py.
"""

import sys

from megatron_keye.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
