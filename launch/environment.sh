# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Chooses the Python interpreter for local.sh and slurm.sbatch, which source it: reads `root`, the
# repository, and sets `python`. megatron_keye/cli/environment.py sets the variables of a rank.

: "${root:?}"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi
unset PYTHONDONTWRITEBYTECODE  # bytecode saves most of the import time of the next run
