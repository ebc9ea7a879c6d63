#!/usr/bin/env bash
# Trains a recipe on this machine: `megatron-keye train` with the repository's interpreter.
#
#   launch/local.sh RECIPE [--ranks N] [ARGUMENTS]      --help lists them
#
# PYTHON names the interpreter; without it .venv/bin/python of the repository, else python3.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
unset RANK  # this shell may be part of another job
# -P: a folder named kernels/ must not shadow a package.
exec "$python" -P -m megatron_keye train "$@"
