#!/usr/bin/env bash
# Trains a recipe on this machine: starts one process of launch/train.py per rank and ends them
# together. Stands in for torchrun, whose own traceback would bury the one sentence that a rank
# says about a wrong setting.
#
#   launch/local.sh [--ranks N] RECIPE [ARGUMENTS OF launch/train.py]
#
# N: --ranks, else the variable RANKS, else the number of GPUs, else 4.
# PYTHON names the interpreter; without it .venv/bin/python of the repository, else python3.
# Ctrl-C, TERM and USR1 let ranks finish their step and save; a second Ctrl-C does not wait.
# Exit status: that of the first rank that failed, 75 after USR1; 0 when all ended well.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
failure_grace_seconds=10
stop_grace_seconds=300  # one step and one checkpoint
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

# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

# The NVIDIA driver's device files say at once that there is no GPU; torch takes seconds to.
gpus=0
if compgen -G "/dev/nvidia[0-9]*" >/dev/null || [[ -e /dev/dxg ]]; then
  gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
fi
if [[ -z "$ranks" ]]; then
  ranks=$(( gpus > 0 ? gpus : default_cpu_ranks ))
fi
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "--ranks: got '$ranks', expected a number of processes"

# What a rank needs beside launch/environment.sh.
export WORLD_SIZE="$ranks"
export LOCAL_WORLD_SIZE="$ranks"
export MASTER_ADDR=127.0.0.1
MASTER_PORT="$("$python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')"
export MASTER_PORT
share_cores "$(nproc)" "$ranks"

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

# end_ranks SECONDS: asks the ranks to end, waits so long, insists. A second Ctrl-C insists at once.
end_ranks() {
  trap '' TERM
  trap 'stop_ranks KILL' INT
  stop_ranks TERM
  local deadline=$(( SECONDS + $1 ))
  while any_rank_alive && (( SECONDS < deadline )); do
    sleep 0.1
  done
  stop_ranks KILL
  wait 2>/dev/null || true
}

trap 'end_ranks "$stop_grace_seconds"; exit 130' INT
trap 'end_ranks "$stop_grace_seconds"; exit 143' TERM HUP
trap 'stop_ranks USR1' USR1

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
      end_ranks "$failure_grace_seconds"
      exit "$status"
    fi
  done
  running=("${still_running[@]}")
done
