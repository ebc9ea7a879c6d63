# shellcheck shell=bash
# What local.sh and slurm.sbatch share: the interpreter. Sourced with `root`, the repository, set;
# sets `python`. The rest of a rank's environment is set by megatron_keye/cli/environment.py.

: "${root:?}"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi
unset PYTHONDONTWRITEBYTECODE  # bytecode saves most of the import time of the next run
