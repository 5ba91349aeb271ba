#!/usr/bin/env bash
# A Ray cluster over the nodes of a SLURM job, and a run on it: sbatch --nodes=4 examples/slurm.sh model=hybrid_125m ...
#SBATCH --job-name=seqtrain
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

port=6379
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Whoever reaches the cluster can run code on it, so it asks for a token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" --block &
sleep 15
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
  srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$head:$port" --block &
  sleep 15
fi

# output_dir and data.cache_dir must lie on a file system that all nodes share.
python launch/pretrain.py runtime.address="$head:$port" output_dir="runs/slurm-$SLURM_JOB_ID" data.cache_dir="$PWD/cache" "$@"
