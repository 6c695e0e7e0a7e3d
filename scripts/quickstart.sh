#!/usr/bin/env bash
# From a fresh clone to a table of scores with its epsilon, offline but for the package registry: sets up .venv, then
# data -> DP-LoRA fine-tuning (2 processes) -> beam search -> decode -> scores, on what the repository carries: a GPT-2
# at several budgets, and a Llama at epsilon 8, with half of its epochs. Computes everything anew each time, in
# quickstart_runs/. At most 5 minutes on 2 cores after installation.
#
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt
rm -rf quickstart_runs
options=(--name quickstart --runs quickstart_runs --results quickstart_runs --data data/demo --vocab vocab/demo
    --seeds 10 --nproc 2 --batch 512 --seq_len 256)
flags=(--lora_dim 8 --lr 0.016 --scheduler linear --adam_beta2 0.98 --weight_decay 0.0 --label_smooth 0.0 --max_epoch 4
    --log_interval 10)
bash scripts/e2e_table.sh "${options[@]}" --epsilon "0 3 8 inf" pretrained_checkpoints/demo -- "${flags[@]}"
exec bash scripts/e2e_table.sh "${options[@]}" --epsilon 8 pretrained_checkpoints/demo-llama -- "${flags[@]}" --max_epoch 2
