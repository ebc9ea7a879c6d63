#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a recipe on this machine: `megatron-keye train` with the repository's interpreter.
#
#   launch/local.sh RECIPE [--ranks N] [ARGUMENTS]      --help lists all
#
# Variable PYTHON: the interpreter; default: .venv/bin/python of the repository, else python3.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
unset RANK  # another job may have set it, and then the command would be one rank
# -P: the folder kernels/ must not shadow the package `kernels`.
exec "$python" -P -m megatron_keye train "$@"
