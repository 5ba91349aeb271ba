#!/usr/bin/env bash
# A Ray cluster on the nodes of a Slurm job, and a run on it; docs/clusters/slurm.md:
#     sbatch --nodes=4 launch/clusters/slurm_ray.sh parallel.data=4 output_dir=/shared/runs/a data.cache_dir=/shared/cache
#SBATCH --job-name=seqtrain
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Two minutes before its time is over the run saves and ends. The same command goes on with it.
#SBATCH --signal=B:TERM@120
set -euo pipefail

port=${PORT:-6379}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
everywhere() { srun --overlap --whole --cpu-bind=none "$@"; }
# The first node's address as the last one sees it: for itself its name may be 127.0.1.1.
address=$(everywhere --nodes=1 --ntasks=1 --nodelist="${nodes[-1]}" getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')

# Whoever reaches the cluster can run code on it, so it asks for a token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

everywhere --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false --num-cpus="$SLURM_CPUS_ON_NODE" --block &
until ray status --address="$address:$port" >/dev/null 2>&1; do sleep 2; done
if ((${#nodes[@]} > 1)); then
  everywhere --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" \
    ray start --address="$address:$port" --num-cpus="$SLURM_CPUS_ON_NODE" --block &
fi
# The run waits for its ranks by itself; but parallel.data=auto takes what is there.
for _ in $(seq 60); do
  (($(ray status --address="$address:$port" | grep -c ' node_') >= ${#nodes[@]})) && break
  sleep 2
done

python launch/pretrain.py runtime.address="$address:$port" "$@" &
run=$!
trap 'kill -TERM "$run"' TERM INT
status=0
wait "$run" || status=$?
# A signal ends `wait`, not the run.
while kill -0 "$run" 2>/dev/null; do wait "$run" && status=0 || status=$?; done
exit "$status"
