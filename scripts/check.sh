#!/usr/bin/env bash
# The quick check, under a minute on two quiet cores: format, lint, types and the fast tests of the core. What starts Ray
# or an engine, trains a model or takes seconds is left to scripts/test.sh.
#   bash scripts/check.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
bash scripts/setup.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy &
types=$!
status=0
.venv/bin/python -m pytest tests/unit/test_structure.py tests/unit/config tests/unit/method tests/unit/trees tests/unit/run \
  -m "not slow" --timeout 60 "$@" || status=$?
wait "$types" || status=1
exit "$status"
