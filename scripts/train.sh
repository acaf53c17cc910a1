#!/usr/bin/env bash
# The main job: trains a small residual network on scikit-learn's digits,
# split into stages, and compares it with ordinary training.
#
#   scripts/train.sh                            # two stages
#   scripts/train.sh --splits=4 --shrink=0.5    # any flag of trainers/digits.py
#   scripts/train.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_venv datasets
exec python -m trainers.digits "$@"
