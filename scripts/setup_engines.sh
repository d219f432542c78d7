#!/usr/bin/env bash
# Builds the environments of the engines that run as servers: sglang and vllm under .venvs, or under TRACE_ASYNC_ENGINES.
#   bash scripts/setup_engines.sh [sglang|vllm]     (none named: both)
# Each engine has its own environment, because their pins contradict each other's and the trainer's. A machine without
# an NVIDIA GPU gets the CPU recipe (about 2 minutes and 3 GB each), one with a GPU the engine's own pins;
# ENGINE_DEVICE=cpu|gpu overrides. Running it again does nothing unless a recipe, the Python or the device changed.
# Without a GPU, PyPI's torch still brings CUDA libraries of several GB: PIP_EXTRA_INDEX_URL can name torch's CPU index.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
recipes=$here/engine_requirements
# As in trace_async/engines/servers/environments.py: a folder that is named, the checkout's, or the user's cache.
if [[ -n ${TRACE_ASYNC_ENGINES:-} ]]; then folder=$TRACE_ASYNC_ENGINES
elif [[ -f $here/../pyproject.toml ]]; then folder=$(cd "$here/.." && pwd)/.venvs
else folder=${XDG_CACHE_HOME:-$HOME/.cache}/trace_async/engines
fi
mkdir -p "$folder"
python=${PYTHON:-python3.11}

device=${ENGINE_DEVICE:-}
if [[ -z $device ]]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=gpu; else device=cpu; fi
fi
[[ $device == cpu || $device == gpu ]] || { echo "ENGINE_DEVICE=$device: cpu or gpu" >&2; exit 2; }

build() {
  local engine=$1 recipe=$recipes/$1-$device venv=$folder/$1 stamp
  stamp=$(cat "$recipe".txt "$recipe"-*.txt 2>/dev/null | { cat; "$python" --version; echo "$device"; } | sha256sum | cut -c1-64)
  if [[ -f $venv/.recipe && $(cat "$venv/.recipe") == "$stamp" ]]; then
    echo "$venv is up to date ($device)"
    return
  fi
  echo "building $venv ($device) ..."
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q -r "$recipe.txt"
  if [[ -f $recipe-no-deps.txt ]]; then "$venv/bin/pip" install -q --no-deps -r "$recipe-no-deps.txt"; fi
  if [[ -f $recipe-remove.txt ]]; then "$venv/bin/pip" uninstall -q -y -r "$recipe-remove.txt"; fi
  echo "$stamp" >"$venv/.recipe"
  echo "built $venv: $(du -sh "$venv" | cut -f1)"
}

engines=("$@")
[[ ${#engines[@]} -gt 0 ]] || engines=(sglang vllm)
for engine in "${engines[@]}"; do
  case $engine in
    sglang | vllm) build "$engine" ;;
    *) echo "unknown engine '$engine': sglang or vllm" >&2; exit 2 ;;
  esac
done
