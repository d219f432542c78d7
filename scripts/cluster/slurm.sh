#!/usr/bin/env bash
# A Ray cluster inside one Slurm job, and a run on it.
#   sbatch --nodes 4 --gpus-per-node 8 scripts/cluster/slurm.sh configs/cluster/qwen3_8b_multihop.yaml [section.name=value ...]
# The project's folder with its .venv must be on a file system that all nodes share; so must output_dir and policy.path.
#SBATCH --job-name=trace-async
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
# The last line: five minutes before the limit the run is told, so that it saves a checkpoint and ends as KILLED.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run me with sbatch}"
config=${1:?name a config}
shift
port=6379
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
# A node's own name may resolve to loopback there, so the others are given its address.
address=$(srun --nodes 1 --ntasks 1 -w "$head" hostname --ip-address | awk '{print $1}')
ray=$PWD/.venv/bin/ray

srun --nodes 1 --ntasks 1 -w "$head" "$ray" start --head --node-ip-address "$address" --port "$port" --block &
if [ "${#nodes[@]}" -gt 1 ]; then
  srun --nodes "$((${#nodes[@]} - 1))" --ntasks "$((${#nodes[@]} - 1))" -x "$head" \
    "$ray" start --address "$address:$port" --block &
fi
# The run itself waits for nothing: it refuses at once what the cluster has no room for. So wait for all nodes here.
until [ "$("$PWD/.venv/bin/python" -c "
import ray
from actors.ray_cluster import join_cluster
join_cluster('$address:$port')
print(sum(node['Alive'] for node in ray.nodes()))" 2>/dev/null || echo 0)" -ge "${#nodes[@]}" ]; do sleep 5; done

.venv/bin/trace-async train --config "$config" "actors.ray_address=$address:$port" "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run" || wait "$run"
