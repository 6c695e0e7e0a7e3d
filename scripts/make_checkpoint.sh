#!/usr/bin/env bash
# A small GPT-2 (4 layers, width 128) to start private trainings from: trained from nothing, without privacy, on public
# text alone. On 2 processes; the same command goes on where it was stopped.
#
#   bash scripts/make_checkpoint.sh demo [OUTPUT]                 # default: pretrained_checkpoints/demo_new
#   bash scripts/make_checkpoint.sh webnlg WEBNLG_DIR [OUTPUT]    # default: pretrained_checkpoints/webnlg
#
# demo    How pretrained_checkpoints/demo was made: 1.0 M parameters, vocab/demo, the generated *public* domain
#         (hostels, coaches, concerts ...), so that it has seen none of the restaurant text that the quickstart
#         protects. About a quarter of an hour on 2 cores.
# webnlg  7.3 M parameters, GPT-2's vocabulary (fetched where it is missing; a mirror of it: scripts/download_vocab.sh),
#         WebNLG 2017 (Gardent et al., 2017; CC BY-NC-SA 4.0), whose facts and sentences are about airports, astronauts,
#         food ... and hold nothing of E2E's. WEBNLG_DIR holds the challenge's train.json and dev.json, as LoRA's NLG
#         example has them in data/webnlg_challenge_2017. Half an hour on 2 cores.
set -euo pipefail
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

checkpoints="$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../pretrained_checkpoints"
case "${1:-}:$#" in
    demo:[12]) output="${2:-$checkpoints/demo_new}" ;;
    webnlg:[23]) corpus="$(realpath -m -- "${2/#~\//$HOME/}")" output="${3:-$checkpoints/webnlg}"
        [ -f "$corpus/train.json" ] && [ -f "$corpus/dev.json" ] ||
            die "$2: holds no train.json and dev.json of WebNLG 2017" ;;
    *) sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$0" >&2; exit 2 ;;
esac
output="$(realpath -m -- "${output/#~\//$HOME/}")"
[ ! -e "$output" ] || die "$output: is there already; move it away, or name another folder"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"  # changes into the repository's root
install_requirements requirements.txt

work="$ROOT/trained_models/$1_pretraining"
mkdir -p "$work"
if [ "$1" = demo ]; then
    "$PYTHON" scripts/start.py make_demo_data --domain public --out "$work"
    texts=("$work"/public_{train,valid}.txt) converter=e2e vocab=vocab/demo
    model=pretrained_checkpoints/demo/config.json
    flags=(--max_epoch 6 --log_interval 100 --eval_interval 500 --save_interval 1000 --micro_batch_tokens 4096)
else
    bash scripts/download_vocab.sh
    texts=("$corpus"/{train,dev}.json) converter=webnlg vocab=vocab
    model="$work/config.json"
    cat > "$model" << 'CONFIG'
{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 50257,
 "n_positions": 512, "n_ctx": 512, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": null,
 "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
 "tie_word_embeddings": true, "bos_token_id": 50256, "eos_token_id": 50256}
CONFIG
    flags=(--max_epoch 5 --log_interval 50 --eval_interval 563 --save_interval 563 --bf16)
fi
for part in train valid; do
    "$PYTHON" "src/format_converting_$converter.py" "${texts[0]}" "$work/${part}_formatted.jsonl"
    "$PYTHON" src/gpt2_encode.py --vocab "$vocab" --add_bos --add_eos \
        --input "$work/${part}_formatted.jsonl" --output "$work/$part.jsonl"
    texts=("${texts[@]:1}")
done
[ ! -s "$work/run/privacy_ledger.jsonl" ] || flags+=(--resume)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_ft.py \
    --train_data "$work/train.jsonl" --valid_data "$work/valid.jsonl" --model_card "$model" --work_dir "$work/run" \
    --noise_multiplier 0 --lora_dim 0 --obj jlm --train_batch_size 16 --seq_len 256 --lr 0.003 --scheduler cosine \
    --warmup_step 100 --correct_bias --adam_beta2 0.98 --weight_decay 0.01 --clip 1.0 --random_seed 1 "${flags[@]}"
"$PYTHON" src/export.py --init_checkpoint "$work/run" --output "$output"
