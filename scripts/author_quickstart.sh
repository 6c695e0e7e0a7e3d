#!/usr/bin/env bash
# Author-level training from a fresh clone, offline but for the package registry: generates a corpus of 2,000 authors,
# fine-tunes a small GPT-2 on 2 processes with epsilon 8 for each author and without privacy, and ends in the rows of
# the table and a plot. Computes everything anew each time, in trained_models/author_quickstart/. Under 3 minutes on 2
# cores after installation.
#
#   bash scripts/author_quickstart.sh [MODEL_FOLDER]     # default: pretrained_checkpoints/demo
set -euo pipefail
model="$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/../pretrained_checkpoints/demo}" && pwd)"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt

runs="$ROOT/trained_models/author_quickstart"
rm -rf "$runs"
mkdir -p "$runs"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

step() { printf '\n== %s\n' "$*"; }

# train NAME FLAGS...: the whole model on 2 processes; 256 expected authors a step, each with one text
train() {
    step "training: $1"
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/fine-tune-dp.py \
        --output_dir "$runs/$1" --model_name "$model" --vocab vocab/demo --train_file "$runs/corpus.jsonl" \
        --eval_fraction 0.05 --sequence_len 64 --per_device_train_batch_size 128 --num_train_epochs 6 \
        --learning_rate 0.005 --max_grad_norm 0 --logging_steps 5 --eval_strategy steps --eval_steps 15 \
        --save_steps 1000 "${@:2}" | tee "$runs/$1.log"
}

step "data: a generated corpus whose texts have authors"
"$PYTHON" scripts/start.py make_author_corpus --authors 2000 --records 8000 --words 25 --out "$runs/corpus.jsonl"
train dp_epsilon8 --target_epsilon 8 --per_sample_max_grad_norm 1.0
train non_private --disable_dp

step "table and plot"
tail -n 3 "$runs/dp_epsilon8.log" | tee "$runs/table.md"
tail -n 1 "$runs/non_private.log" | tee -a "$runs/table.md"
"$PYTHON" scripts/plot_run.py "$runs/dp_epsilon8" "$runs/non_private" --out "$runs/runs.png"
