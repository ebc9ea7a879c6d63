# SPDX-License-Identifier: Apache-2.0
"""Reports what is installed on this machine and what is missing: `megatron-keye doctor`.

The command is in megatron_keye/cli/doctor.py.
"""

import sys

from megatron_keye.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
