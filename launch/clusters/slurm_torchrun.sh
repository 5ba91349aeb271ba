#!/usr/bin/env bash
# torchrun on the nodes of a Slurm job, without Ray; docs/clusters/slurm.md:
#     sbatch --nodes=4 launch/clusters/slurm_torchrun.sh parallel.data=4 output_dir=/shared/runs/a data.cache_dir=/shared/cache
#SBATCH --job-name=seqtrain
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Two minutes before its time is over all ranks are told, save and end. The same command goes on with the run.
#SBATCH --signal=TERM@120
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
everywhere() { srun --overlap --whole --cpu-bind=none "$@"; }
# The first node's address as the last one sees it: for itself its name may be 127.0.1.1.
MASTER=$(everywhere --nodes=1 --ntasks=1 --nodelist="${nodes[-1]}" getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }')
# Ranks of a node: its GPUs, or one.
export MASTER PORT=${PORT:-29500} RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-1}}

# shellcheck disable=SC2016 # Slurm's variables are each node's.
everywhere bash -c 'exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS" --node-rank="$SLURM_NODEID" \
  --master-addr="$MASTER" --master-port="$PORT" launch/pretrain.py runtime=inline "$@"' seqtrain "$@"
