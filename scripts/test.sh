#!/usr/bin/env bash
# Format, lint, types and tests. Arguments go to pytest:
#
#   scripts/test.sh
#   scripts/test.sh -n 0 -m "not slow" tests/test_delays.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_venv datasets dev

failed=()

# Goes on after a failure, so that one run shows all that is wrong.
step() {
    local name="$1"
    shift
    echo "== $name: $*"
    "$@" || failed+=("$name")
}

step format ruff format --check .
step lint ruff check .
step types mypy fdg_keras

echo "== tests"
if ((${#failed[@]})); then
    # Said before the tests run: pytest's closing line stays the last.
    echo "FAILED before the tests: ${failed[*]}"
fi
# Tests spend their time tracing graphs, in Python: one process for each core.
# More than four would only take memory. A later -n wins.
workers="$(nproc)"
status=0
python -m pytest -n "$((workers < 4 ? workers : 4))" --dist worksteal "$@" ||
    status=$?
if ((${#failed[@]} && status == 0)); then
    status=1
fi
exit "$status"
