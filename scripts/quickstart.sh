#!/usr/bin/env bash
# One command from nothing to a trained agent: installs, builds a small policy, trains it with TRACE, evaluates it.
#   bash scripts/quickstart.sh [multihop|math|functions|quest|smollm2] [section.setting=value ...]
# smollm2: a pretrained model of 135 M parameters in place of the small one; settings count for its training alone.
set -euo pipefail
cd "$(dirname "$0")/.."
domain=multihop
case "${1:-}" in
  multihop | math | functions | quest | smollm2) domain=$1; shift ;;
  "" | *=*) ;;
  *) echo "unknown domain '$1': multihop, math, functions, quest or smollm2" >&2; exit 2 ;;
esac
bash scripts/setup.sh
config=configs/quickstart/$domain.yaml
if [ "$domain" = smollm2 ]; then
  export OMP_NUM_THREADS=1
  pretrained=$(.venv/bin/trace-async get-policy smollm2)
  taught=$(.venv/bin/trace-async make-policy --config "$config" "policy.path=$pretrained")
  set -- "policy.path=$taught" "$@"
fi
exec .venv/bin/trace-async train --config "$config" "$@"
