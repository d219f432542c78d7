#!/usr/bin/env bash
# One command from nothing to a trained agent: installs, builds a small policy, trains it with TRACE, evaluates it.
#   bash scripts/quickstart.sh [multihop|math|functions] [section.setting=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
domain=multihop
case "${1:-}" in
  multihop | math | functions) domain=$1; shift ;;
  "" | *=*) ;;
  *) echo "unknown domain '$1': multihop, math or functions" >&2; exit 2 ;;
esac
bash scripts/setup.sh
config=configs/quickstart/$domain.yaml
exec .venv/bin/trace-async train --config "$config" "$@"
