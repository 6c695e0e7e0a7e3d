#!/usr/bin/env bash
# Inside a Slurm job: SCRIPT on every GPU of every node, through one torchrun agent a node.
#
#   bash scripts/slurm_launch.sh SCRIPT ARGUMENTS...
#
# Where a process dies its run is started again, at most three times, and goes on from its last checkpoint: the job's
# number is torchrun's --rdzv_id, by which a run knows its own folder again.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
gpus="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}"
# With torch's shared store an agent that takes the place of a lost one is never told where the workers meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${gpus##*:}" \
    --rdzv_backend=c10d --rdzv_endpoint="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id="$SLURM_JOB_ID" \
    --max_restarts=3 "$@"
