#!/usr/bin/env bash
# Everything that must hold: installs what is missing, then format, lint, types and all tests (real Ray, DeepSpeed,
# SGLang and vLLM servers, MLflow's store, a page in Chromium where there is one).
#   bash scripts/test.sh [pytest arguments]
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
exec .venv/bin/python -m pytest "$@"
