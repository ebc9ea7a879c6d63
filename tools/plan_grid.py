# SPDX-License-Identifier: Apache-2.0
"""Shows ranks, parameters and memory of a recipe, or the plan of one step: `megatron-keye plan`.

The command is in megatron_keye/cli/plan.py.
"""

import sys

from megatron_keye.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
