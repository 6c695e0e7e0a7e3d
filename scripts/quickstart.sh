#!/usr/bin/env bash
# From a fresh clone to a table of scores with its epsilon, offline but for the package registry: sets up .venv, then
# data -> DP-LoRA fine-tuning (2 processes) -> beam search -> decode -> scores, on what the repository carries. Computes
# everything anew each time, in quickstart_runs/. At most 5 minutes on 2 cores after installation.
#
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt

runs="$ROOT/quickstart_runs"
rm -rf "$runs"
mkdir -p "$runs"
base=pretrained_checkpoints/demo
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

step() { printf '\n== %s\n' "$*"; }

step "data: restaurant descriptions (data/demo) into tokens"
for part in train valid test; do
    "$PYTHON" src/format_converting_e2e.py "data/demo/$part.txt" "$runs/${part}_formatted.jsonl"
    "$PYTHON" src/gpt2_encode.py --vocab vocab/demo --add_bos --add_eos \
        --input "$runs/${part}_formatted.jsonl" --output "$runs/$part.jsonl"
done

# train NAME FLAGS...: LoRA fine-tuning on 2 processes; a logical batch of 512 expected examples
train() {
    step "training: $1"
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_ft.py \
        --train_data "$runs/train.jsonl" --valid_data "$runs/valid.jsonl" --init_checkpoint "$base" --model_card "$base" \
        --train_batch_size 256 --max_grad_norm 1.0 --seq_len 256 --lora_dim 8 --lora_alpha 32 \
        --lr 0.016 --scheduler linear --correct_bias --adam_beta2 0.98 --weight_decay 0.0 --max_epoch 4 \
        --log_interval 10 --eval_interval 1000 --save_interval 1000 --work_dir "$runs/$1" "${@:2}"
}

# score NAME CHECKPOINT: beam search, decode, scores
score() {
    step "generation and scores: $1"
    mkdir -p "$runs/$1"
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_beam.py \
        --data "$runs/test.jsonl" --init_checkpoint "$2" --seq_len 256 --eval_len 64 --beam 10 --length_penalty 0.8 \
        --no_repeat_ngram_size 4 --work_dir "$runs/$1" --output_file predict.jsonl
    "$PYTHON" src/gpt2_decode.py --vocab vocab/demo --sample_file "$runs/$1/predict.jsonl" \
        --input_file "$runs/test_formatted.jsonl" \
        --output_ref_file "$runs/$1/ref.txt" --output_pred_file "$runs/$1/pred.txt"
    "$PYTHON" eval/e2e/measure_scores.py "$runs/$1/ref.txt" "$runs/$1/pred.txt" -p --json "$runs/$1/scores.json"
}

train dp_epsilon8 --target_epsilon 8
train dp_epsilon3 --target_epsilon 3
train non_private --noise_multiplier 0
score untuned "$base"
score dp_epsilon3 "$runs/dp_epsilon3"
score dp_epsilon8 "$runs/dp_epsilon8"
score non_private "$runs/non_private"

step "table and plot"
"$PYTHON" scripts/quickstart_table.py "$runs" untuned dp_epsilon3 dp_epsilon8 non_private
