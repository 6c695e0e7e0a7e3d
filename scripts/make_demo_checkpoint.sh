#!/usr/bin/env bash
# Makes pretrained_checkpoints/demo: a small GPT-2 pre-trained, without privacy, on the generated *public* domain alone
# (hostels, coaches, concerts ...), so that it has seen none of the restaurant text that the quickstart protects.
# About a quarter of an hour on 2 cores.
#
#   bash scripts/make_demo_checkpoint.sh [OUTPUT_FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt
output="${1:-$ROOT/pretrained_checkpoints/demo_new}"
work="$ROOT/trained_models/demo_pretraining"
mkdir -p "$work"
"$PYTHON" scripts/make_demo_data.py --domain public --out "$work"
for part in train valid; do
    "$PYTHON" src/format_converting_e2e.py "$work/public_$part.txt" "$work/${part}_formatted.jsonl"
    "$PYTHON" src/gpt2_encode.py --vocab vocab/demo --add_bos --add_eos \
        --input "$work/${part}_formatted.jsonl" --output "$work/$part.jsonl"
done
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_ft.py \
    --train_data "$work/train.jsonl" --valid_data "$work/valid.jsonl" \
    --model_card pretrained_checkpoints/demo/config.json --noise_multiplier 0 --lora_dim 0 --obj jlm \
    --train_batch_size 16 --max_epoch 6 --seq_len 256 --lr 0.003 --scheduler cosine --warmup_step 100 \
    --correct_bias --adam_beta2 0.98 --weight_decay 0.01 --clip 1.0 --random_seed 1 \
    --log_interval 100 --eval_interval 500 --save_interval 1000 --micro_batch_tokens 4096 --work_dir "$work/run"
"$PYTHON" src/export.py --init_checkpoint "$work/run" --output "$output"
