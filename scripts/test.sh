#!/usr/bin/env bash
# Everything that must hold: installs what is missing, then format, lint, types and all tests (real Ray, DeepSpeed,
# SGLang and vLLM servers, MLflow's store, a page in Chromium where there is one). Two groups of tests run side by side,
# since most of them wait for processes to start; TEST_WORKERS sets another number.
#   bash scripts/test.sh [pytest arguments]           what CI runs
#   bash scripts/test.sh --slow [pytest arguments]    what takes minutes a test and is left out of that
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
bash scripts/setup.sh
bash scripts/setup_engines.sh
# The services of BFCL, without the package's dependencies (docs/domains.md says why).
.venv/bin/python -c "import bfcl_eval" 2>/dev/null || .venv/bin/python -m pip install -q --no-deps bfcl-eval==2026.3.23
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
if [ "${1:-}" = --slow ]; then
  shift
  exec .venv/bin/python -m pytest -m exhaustive "$@"
fi
# A module, or a class, stays in one worker, because its tests share an engine or a Ray.
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadscope "$@"
