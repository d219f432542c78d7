#!/usr/bin/env bash
# Makes the virtual environment .venv and installs the project into it; quick when nothing has changed.
# Needs Python 3.11 or newer, git and a C++ compiler. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" - <<'CHECK'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name another one: PYTHON=/path/to/python")
CHECK
stamp=.venv/installed
wanted=$(cat pyproject.toml requirements.lock scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
echo "Installing into $PWD/.venv (a few minutes, once) ..."
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
log=$(mktemp)
all=$(grep -c == requirements.lock)
# On a terminal: how far pip is, in one line. pip itself stays in the foreground, where Ctrl-C reaches it.
show_progress() {
  while sleep 1; do
    if grep -q '^Installing collected' "$log"; then doing="unpacking"; else doing="found $(grep -cE '^ *(Collecting|Requirement already)' "$log" || true) of about $all packages"; fi
    printf '\r\033[K  %s, %d s' "$doing" "$SECONDS"
  done
}
install() {
  local ended=0
  if [ -t 1 ]; then
    show_progress &
    watcher=$!
    trap 'kill "$watcher" 2>/dev/null || true' EXIT
  fi
  .venv/bin/python -m pip install --disable-pip-version-check "$@" -e ".[dev,lora,models,tensorboard]" >"$log" 2>&1 || ended=$?
  if [ -t 1 ]; then
    kill "$watcher"
    printf '\r\033[K'
  fi
  return "$ended"
}
# The versions of requirements.lock, or, where it was not made for this Python or platform, the newest that are allowed.
if ! install -c requirements.lock && ! { echo "requirements.lock does not fit here; taking the newest versions that pyproject.toml allows"; install; }; then
  tail -n 30 "$log"
  echo "The installation failed; its whole output is in $log" >&2
  exit 1
fi
rm -f "$log"
echo "$wanted" >"$stamp"
