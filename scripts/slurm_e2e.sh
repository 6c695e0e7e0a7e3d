#!/usr/bin/env bash
#SBATCH --job-name=e2e
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# The E2E table on the nodes of a Slurm job, from the repository's root. Options, models and flags are e2e_table.sh's.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_e2e.sh --method full gpt2.xl
#
# The logical batch stays 128 whatever the number of GPUs. Three minutes before the time limit the run finishes its step
# and saves, and the job is put back into the queue, to go on from there; so does a job that Slurm itself preempts. All
# nodes must see the same folder. Fetch data and checkpoints first, where compute nodes have no network.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[ -f scripts/e2e_table.sh ] || { echo "error: $PWD: not the repository's root; run sbatch there" >&2; exit 2; }

gpus="$(bash scripts/slurm_launch.sh --count)"
LAUNCHER="bash scripts/slurm_launch.sh" bash scripts/e2e_table.sh --nproc "$gpus" "$@" &
table=$!

requeue() {
    trap '' TERM
    kill -TERM "$table" 2> /dev/null || true
    wait "$table" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
}
trap requeue TERM
wait "$table"
