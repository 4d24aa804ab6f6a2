#!/usr/bin/env bash
# Install mxq with its dev extra into .venv, and the oldest Triton beside it, then run every check:
# ruff, mypy, pytest.
# All four run even if one fails. Arguments go to pytest, e.g. scripts/test.sh -k packing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

failed=()
check() {
    echo "== $1"
    if ! "$python" -m "${@:2}"; then failed+=("$1"); fi
}

prepare_environment dev
prepare_oldest_triton
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
export HF_HUB_OFFLINE=1
check "pytest" pytest -n 2 -q "$@"

if ((${#failed[@]} > 0)); then
    fail "failed: $(IFS=, && echo "${failed[*]}")"
fi
echo "all checks passed"
