#!/usr/bin/env bash
# Trains a recipe on this machine: starts one process of launch/train.py per rank and ends them
# together. Stands in for torchrun, whose own traceback would bury the one sentence that a rank
# says about a wrong setting.
#
#   launch/local.sh [--ranks N] RECIPE [ARGUMENTS OF launch/train.py]
#
# N: --ranks, else the variable RANKS, else the number of GPUs, else 4.
# PYTHON names the interpreter; without it .venv/bin/python of the repository, else python3.
# Exit status: that of the first rank that failed; 0 when all ended well.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
grace_seconds=10
default_cpu_ranks=4

fail() {
  echo "launch/local.sh: $1" >&2
  exit 2
}

ranks="${RANKS:-}"
if [[ "${1:-}" == --ranks ]]; then
  (( $# >= 2 )) || fail "--ranks: got nothing, expected a number of processes"
  ranks="$2"
  shift 2
fi
(( $# >= 1 )) || fail "got no recipe, expected: launch/local.sh [--ranks N] RECIPE [ARGUMENTS]"

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi

# The NVIDIA driver's device files say at once that there is no GPU; torch takes seconds to.
gpus=0
if compgen -G "/dev/nvidia[0-9]*" >/dev/null || [[ -e /dev/dxg ]]; then
  gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
fi
if [[ -z "$ranks" ]]; then
  ranks=$(( gpus > 0 ? gpus : default_cpu_ranks ))
fi
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "--ranks: got '$ranks', expected a number of processes"

# Everything a rank's environment needs, in one visible place.
export WORLD_SIZE="$ranks"
export LOCAL_WORLD_SIZE="$ranks"
export MASTER_ADDR=127.0.0.1
MASTER_PORT="$("$python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')"
export MASTER_PORT
export PYTHONSAFEPATH=1              # a folder named kernels/ must not shadow a package
# 1 orders tensor-parallel communication before the matmuls. Without tensor parallelism 8 lets
# vision ranks compute behind a message that still waits for the decoder.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
unset PYTHONDONTWRITEBYTECODE        # bytecode saves most of the import time of the next run
# Ranks share the cores; more than 8 threads a rank only get in each other's way.
threads=$(( $(nproc) / ranks ))
threads=$(( threads < 1 ? 1 : threads > 8 ? 8 : threads ))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

pids=()

stop_ranks() {
  local signal="$1" pid
  for pid in "${pids[@]}"; do
    kill "-$signal" "$pid" 2>/dev/null || true
  done
}

any_rank_alive() {
  local pid
  for pid in "${pids[@]}"; do
    kill -0 "$pid" 2>/dev/null && return 0
  done
  return 1
}

# Asks the ranks to end, waits for the grace, insists.
end_ranks() {
  trap '' INT TERM
  stop_ranks TERM
  local deadline=$(( SECONDS + grace_seconds ))
  while any_rank_alive && (( SECONDS < deadline )); do
    sleep 0.1
  done
  stop_ranks KILL
  wait 2>/dev/null || true
}

trap 'end_ranks; exit 130' INT
trap 'end_ranks; exit 143' TERM HUP

for (( rank = 0; rank < ranks; rank++ )); do
  RANK=$rank LOCAL_RANK=$rank "$python" "$root/launch/train.py" "$@" &
  pids+=($!)
done

# Polls, because `wait -n` may miss a process that ended before it was called.
running=("${pids[@]}")
while (( ${#running[@]} > 0 )); do
  sleep 0.2
  still_running=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      still_running+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if (( status != 0 )); then
      # A rank that was killed could not say anything itself.
      (( status <= 128 )) \
        || echo "launch/local.sh: process $pid was ended by signal $(( status - 128 ))" >&2
      end_ranks
      exit "$status"
    fi
  done
  running=("${still_running[@]}")
done
