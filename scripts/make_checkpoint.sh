#!/usr/bin/env bash
# A small model (4 layers) to start private trainings from: trained from nothing, without privacy, on public text alone.
# On 2 processes; the same command goes on where it was stopped.
#
#   bash scripts/make_checkpoint.sh demo [OUTPUT]                 # default: pretrained_checkpoints/demo_new
#   bash scripts/make_checkpoint.sh demo-llama [OUTPUT]           # default: pretrained_checkpoints/demo-llama_new
#   bash scripts/make_checkpoint.sh webnlg WEBNLG_DIR [OUTPUT]    # default: pretrained_checkpoints/webnlg
#   bash scripts/make_checkpoint.sh english [--text DIR] [--mirror DIR] [--finish] [OUTPUT]
#                                                                 # default: pretrained_checkpoints/english
#
# demo    How pretrained_checkpoints/demo was made: 1.0 M parameters, vocab/demo, the generated *public* domain
#         (hostels, coaches, concerts ...), so that it has seen none of the restaurant text that the quickstart
#         protects. About a quarter of an hour on 2 cores.
# demo-llama  How pretrained_checkpoints/demo-llama was made: a Llama of 1.0 M parameters in float16 (4 heads of queries
#         and 2 of keys, tied), by the same text, ids and flags, with vocab/demo as tokenizer.json beside it.
# webnlg  7.3 M parameters, GPT-2's vocabulary (fetched where it is missing; a mirror of it: scripts/download_vocab.sh),
#         WebNLG 2017 (Gardent et al., 2017; CC BY-NC-SA 4.0), whose facts and sentences are about airports, astronauts,
#         food ... and hold nothing of E2E's. WEBNLG_DIR holds the challenge's train.json and dev.json, as LoRA's NLG
#         example has them in data/webnlg_challenge_2017. Half an hour on 2 cores.
# english 3.5 M parameters in float16, with its own vocabulary of 8,192 pieces beside them (--vocab OUTPUT). Passes over
#         five packages of Debian 12 (two dictionaries, The Devil's Dictionary, WordNet's glosses, the Bible; fetched by
#         apt-get download, or taken from --text DIR), then WebNLG 2017 written as E2E writes its facts (fetched, or
#         from --mirror DIR), the learning rate falling to 0. docs/english.md has the sources, their licences and
#         figures. Hours on 2 cores; --finish ends the passes where they were stopped and goes on to WebNLG.
set -euo pipefail
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}
usage() {
    sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$0" >&2
    exit 2
}
folder_of() {  # FLAG DIR: its absolute path
    local path="${2/#~\//$HOME/}"
    [ -d "$path" ] || die "$1 $2: no such folder"
    realpath -- "$path"
}

kind="${1:-}"
[ $# -eq 0 ] || shift
text="" mirror="" finish="" names=()
while [ $# -gt 0 ]; do
    case "$kind:$1" in
        english:--text) [ $# -ge 2 ] || die "--text: wants a folder after it"
            text="$(folder_of "$1" "$2")"
            shift ;;
        english:--mirror) [ $# -ge 2 ] || die "--mirror: wants a folder after it"
            mirror="$(folder_of "$1" "$2")"
            shift ;;
        english:--finish) finish=1 ;;
        *:-*) usage ;;
        *) names+=("$1") ;;
    esac
    shift
done
checkpoints="$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../pretrained_checkpoints"
case "$kind:${#names[@]}" in
    demo:[01] | demo-llama:[01]) output="${names[0]:-$checkpoints/${kind}_new}" ;;
    english:[01]) output="${names[0]:-$checkpoints/english}" ;;
    webnlg:[12]) corpus="$(realpath -m -- "${names[0]/#~\//$HOME/}")" output="${names[1]:-$checkpoints/webnlg}"
        [ -f "$corpus/train.json" ] && [ -f "$corpus/dev.json" ] ||
            die "${names[0]}: holds no train.json and dev.json of WebNLG 2017" ;;
    *) usage ;;
esac
output="$(realpath -m -- "${output/#~\//$HOME/}")"
[ ! -e "$output" ] || die "$output: is there already; move it away, or name another folder"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"  # changes into the repository's root
install_requirements requirements.txt

work="$ROOT/trained_models/${kind}_pretraining"
mkdir -p "$work"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# config VOCABULARY WIDTH HEADS: prints the shape, in Hugging Face's layout.
config() {
    cat << CONFIG
{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": $1,
 "n_positions": 512, "n_ctx": 512, "n_embd": $2, "n_layer": 4, "n_head": $3, "n_inner": null,
 "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
 "tie_word_embeddings": true, "bos_token_id": $(($1 - 1)), "eos_token_id": $(($1 - 1))}
CONFIG
}

# pretrain RUN FLAGS...: a training without privacy in $work/RUN, gone on with where it was begun. --noise_seed seeds the
# order of the examples, which a resumed run then keeps.
pretrain() {
    local run="$work/$1" resume=()
    shift
    [ ! -s "$run/privacy_ledger.jsonl" ] || resume=(--resume)
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 src/gpt2_ft.py --model_card "$model" \
        --work_dir "$run" --noise_multiplier 0 --lora_dim 0 --seq_len 256 --lr 0.003 --correct_bias --adam_beta2 0.98 \
        --clip 1.0 --random_seed 1 --noise_source seeded --noise_seed 1 "$@" "${resume[@]}"
}

# ended RUN: whether the training in $work/RUN has done its last step.
ended() {
    [ -f "$work/$1/privacy.json" ] && grep -q '"train_runtime"' "$work/$1/privacy.json"
}

# for_the_repository FOLDER: without the account of the run, whose data were generated and protect nobody: it names a
# folder of this machine, and a training from here would repeat it.
for_the_repository() {
    "$PYTHON" - "$1/model.safetensors" << 'PROGRAM'
import pathlib
import sys
import safetensors.torch
path = pathlib.Path(sys.argv[1])
part = path.with_suffix(".partial")
part.write_bytes(safetensors.torch.save(safetensors.torch.load(path.read_bytes()), metadata={"format": "pt"}))
part.replace(path)
PROGRAM
    rm -f "$1/privacy.json" "$1/README.md"
}

make_english() {
    local made="$work/corpus" webnlg="$ROOT/data/webnlg" part file package checkpoints
    local home=https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/webnlg_challenge_2017
    if [ ! -f "$made/corpus.json" ]; then
        if [ -z "$text" ]; then
            text="$work/packages"
            mkdir -p "$text"
            while read -r file package; do
                [ -f "$text/$file" ] || (cd "$text" && apt-get download "$package") ||
                    die "$package: cannot be downloaded; on Debian 12, run apt-get update, or fetch $file elsewhere" \
                        "and give --text DIR"
            done < <("$PYTHON" scripts/start.py make_english_corpus --list)
        fi
        source "$ROOT/scripts/fetch.sh"  # its die says the same
        MIRROR="$mirror"
        for part in train dev; do  # make_english_corpus checks what they say
            fetch "data/webnlg/$part.json" "$home/$part.json" - "webnlg/$part.json" "webnlg_challenge_2017/$part.json"
        done
        "$PYTHON" scripts/start.py make_english_corpus --text "$text" --webnlg "$webnlg" --out "$made"
    fi
    model="$work/config.json"
    config 8192 192 6 > "$model"
    if [ -z "$finish" ] && [ ! -d "$work/form" ] && ! ended stable; then
        pretrain stable --train_data "$made/text_train.jsonl" --valid_data "$made/text_valid.jsonl" \
            --train_batch_size 8 --scheduler constant --warmup_step 200 --weight_decay 0.1 --no_decay_bias --bf16 \
            --max_epoch 6 --log_interval 50 --eval_interval 500 --save_interval 500
    fi
    if ! ended form; then
        checkpoints=("$work"/stable/model.*.pt)
        [ -f "${checkpoints[0]}" ] || die "--finish: $work/stable has no checkpoint yet; leave the flag out"
        pretrain form --train_data "$made/mixed_train.jsonl" --valid_data "$made/form_valid.jsonl" \
            --init_checkpoint "$work/stable" --train_batch_size 8 --scheduler linear --warmup_step 50 \
            --weight_decay 0.1 --no_decay_bias --bf16 --max_epoch 2 --log_interval 50 --eval_interval 500 \
            --save_interval 250
    fi
    "$PYTHON" src/export.py --init_checkpoint "$work/form" --output "$output" --vocab "$made/vocab" --float16
}

if [ "$kind" = english ]; then
    make_english
    exit
elif [ "$kind" != webnlg ]; then
    "$PYTHON" scripts/start.py make_demo_data --domain public --out "$work"
    texts=("$work"/public_{train,valid}.txt) converter=e2e vocab=vocab/demo
    model="pretrained_checkpoints/$kind/config.json"
    flags=(--max_epoch 6 --log_interval 100 --eval_interval 500 --save_interval 1000 --micro_batch_tokens 4096)
else
    bash scripts/download_vocab.sh
    texts=("$corpus"/{train,dev}.json) converter=webnlg vocab=vocab
    model="$work/config.json"
    config 50257 128 4 > "$model"
    flags=(--max_epoch 5 --log_interval 50 --eval_interval 563 --save_interval 563 --bf16)
fi
for part in train valid; do
    "$PYTHON" "src/format_converting_$converter.py" "${texts[0]}" "$work/${part}_formatted.jsonl"
    "$PYTHON" src/gpt2_encode.py --vocab "$vocab" --add_bos --add_eos \
        --input "$work/${part}_formatted.jsonl" --output "$work/$part.jsonl"
    texts=("${texts[@]:1}")
done
pretrain run --train_data "$work/train.jsonl" --valid_data "$work/valid.jsonl" --obj jlm --train_batch_size 16 \
    --scheduler cosine --warmup_step 100 --weight_decay 0.01 "${flags[@]}"
flags=()
if [ "$kind" = demo-llama ]; then
    mkdir -p "$work/vocab"
    "$PYTHON" scripts/start.py make_demo_vocab --vocab "$vocab" --out "$work/vocab"
    flags=(--vocab "$work/vocab" --float16)
fi
"$PYTHON" src/export.py --init_checkpoint "$work/run" --output "$output" "${flags[@]}"
[ "$kind" = webnlg ] || for_the_repository "$output"
