# SPDX-License-Identifier: Apache-2.0
"""Times updates whose state lies on the device or in main memory, and the drawing of weights.

    python -m tools.benchmark_optimizer --parameters 2000000000 --out optimizer.jsonl

Weights are bfloat16 with float32 gradients, in tensors as large as an expert's. Beside this
project's staged AdamW run torch's fused one on float32 and Megatron-Core's HybridDeviceOptimizer,
which computes on the processors. Every case prints a JSON line; one that runs out of memory says
so, and the next one runs. Without a GPU it shows that most cases work and proves nothing of speed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_keye.cli.arguments import make_parser, positive_integer
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import reports_user_errors


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.benchmark_optimizer", __doc__)
    size = "weights; default: 2 billion on a GPU, 20 million without"
    parser.add_argument("--parameters", type=positive_integer, default=0, help=size)
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Time every case and return the exit status."""
    options = parse_arguments(arguments)
    # Both before torch is imported.
    complete_environment(os.environ, local_ranks=1)
    quieten_libraries()
    from tools.benchmark_optimizer_cases import measure_all

    measure_all(options.parameters, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
