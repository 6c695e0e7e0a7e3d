#!/usr/bin/env bash
# Inside a Slurm job, from the repository's root: SCRIPT on every GPU of every node, through one torchrun agent a node.
#
#   bash scripts/slurm_launch.sh SCRIPT ARGUMENTS...
#   bash scripts/slurm_launch.sh --count                    # print the number of GPUs, of all nodes
#
# Where a process dies SCRIPT is started again, at most three times. A training then goes on from its last checkpoint:
# the job's number is torchrun's --rdzv_id, by which a run knows its own folder again. Anything else starts anew.
set -euo pipefail
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST; do
    [ -n "${!name:-}" ] || die "$name is not set; start inside a Slurm job, as sbatch scripts/slurm_e2e.sh does"
done
gpus="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}" # "8" or "a100:8"
gpus="${gpus##*:}"
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || die "--gpus-per-node: the job has no GPU on its nodes; ask for some"
[ $# -gt 0 ] || die "SCRIPT is missing; wanted scripts/slurm_launch.sh SCRIPT ARGUMENTS..."
[ "$1" != --count ] || { echo "$((SLURM_JOB_NUM_NODES * gpus))"; exit; }

for program in scontrol srun; do
    command -v "$program" > /dev/null || die "$program: no such program; start where Slurm's programs are"
done
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
# With torch's shared store an agent that takes the place of a lost one is never told where the workers meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-python3}" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" \
    --rdzv_backend=c10d --rdzv_endpoint="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id="$SLURM_JOB_ID" \
    --max_restarts=3 "$@"
