# shellcheck shell=bash
# What local.sh and slurm.sbatch share: interpreter and environment of a rank.
# Sourced with `root`, the repository, set; sets `python`.

: "${root:?}"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi

export PYTHONSAFEPATH=1              # a folder named kernels/ must not shadow a package
# 1 orders tensor-parallel communication before the matmuls. Without tensor parallelism 8 lets
# vision ranks compute behind a message that still waits for the decoder.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
unset PYTHONDONTWRITEBYTECODE        # bytecode saves most of the import time of the next run

# Ranks share a machine's cores; more than 8 threads a rank only get in each other's way.
# share_cores CORES RANKS
share_cores() {
  local threads=$(( $1 / $2 ))
  threads=$(( threads < 1 ? 1 : threads > 8 ? 8 : threads ))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
}
