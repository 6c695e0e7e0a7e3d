#!/usr/bin/env bash
# Synthetic text from a fresh clone, offline but for the package registry: trains the demonstration's model on generated
# restaurant descriptions with epsilon 8 and, long enough to overfit, without privacy; lets both write; and judges what
# the samples are worth and what they leak. Ends with samples, a table and one page. Computes everything anew each time,
# in trained_models/synthetic_quickstart/. Meant to take at most 5 minutes on 2 cores after installation;
# docs/synthetic.md has what was measured.
#
#   bash scripts/synthetic_quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt
rm -rf trained_models/synthetic_quickstart
PYTHON="$PYTHON" exec bash scripts/synthesize.sh --runs trained_models/synthetic_quickstart --nproc 2 \
    --data data/demo --vocab vocab/demo --model pretrained_checkpoints/demo --seq_len 128 --epsilon 8 --batch 512 \
    --samples 8 --temperature 0.7 --max_new_tokens 60 --others 255 --open_batch 32 \
    --private_flags "--lora_dim 8 --lr 0.016 --scheduler linear --adam_beta2 0.98 --weight_decay 0.0 --max_epoch 4 \
        --log_interval 3" \
    --open_flags "--lr 0.002 --scheduler linear --correct_bias --weight_decay 0.0 --max_epoch 6 \
        --log_interval 50" \
    --use_flags "--lr 0.002 --scheduler linear --correct_bias --weight_decay 0.0 --max_step 150 \
        --log_interval 50"
