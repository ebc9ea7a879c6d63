# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_keye` is the command `megatron-keye`."""

import sys

from megatron_keye.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
