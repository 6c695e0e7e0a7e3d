#!/usr/bin/env bash
# Makes pretrained_checkpoints/webnlg: a small GPT-2 (4 layers, width 128, GPT-2's vocabulary, 7.3 M parameters) trained
# from nothing, without privacy, on public text alone: WebNLG 2017 (Gardent et al., 2017; CC BY-NC-SA 4.0), whose facts
# and sentences are about airports, astronauts, food ... and hold nothing of E2E's. Half an hour on 2 cores.
#
#   bash scripts/make_webnlg_checkpoint.sh WEBNLG_DIR [OUTPUT_FOLDER]
#
# WEBNLG_DIR holds the challenge's train.json and dev.json, as LoRA's NLG example has them in
# data/webnlg_challenge_2017. The vocabulary is fetched where it is missing; a mirror of it: scripts/download_vocab.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$0" >&2; exit 2; }
[ -f "$1/train.json" ] && [ -f "$1/dev.json" ] || {
    echo "error: $1: holds no train.json and dev.json of WebNLG 2017" >&2; exit 2; }
webnlg="$1"
output="${2:-$ROOT/pretrained_checkpoints/webnlg}"
work="$ROOT/trained_models/webnlg_pretraining"
[ ! -e "$output" ] || { echo "error: $output: is there already; move it away, or name another folder" >&2; exit 2; }
install_requirements requirements.txt
bash scripts/download_vocab.sh
mkdir -p "$work/model"
cat > "$work/model/config.json" << 'CONFIG'
{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 50257,
 "n_positions": 512, "n_ctx": 512, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": null,
 "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
 "tie_word_embeddings": true, "bos_token_id": 50256, "eos_token_id": 50256}
CONFIG
for part in train dev; do
    "$PYTHON" src/format_converting_webnlg.py "$webnlg/$part.json" "$work/${part}_formatted.jsonl"
    "$PYTHON" src/gpt2_encode.py --vocab vocab --add_bos --add_eos \
        --input "$work/${part}_formatted.jsonl" --output "$work/$part.jsonl"
done
resume=()
[ ! -s "$work/run/privacy_ledger.jsonl" ] || resume=(--resume)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_ft.py \
    --train_data "$work/train.jsonl" --valid_data "$work/dev.jsonl" --model_card "$work/model/config.json" \
    --noise_multiplier 0 --lora_dim 0 --obj jlm --train_batch_size 16 --max_epoch 5 --seq_len 256 \
    --lr 0.003 --scheduler cosine --warmup_step 100 --correct_bias --adam_beta2 0.98 --weight_decay 0.01 --clip 1.0 \
    --random_seed 1 --log_interval 50 --eval_interval 563 --save_interval 563 --bf16 --work_dir "$work/run" \
    "${resume[@]}"
"$PYTHON" src/export.py --init_checkpoint "$work/run" --output "$output"
