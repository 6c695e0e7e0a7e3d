#!/usr/bin/env bash
# The author-level experiment as a table: full fine-tuning and LoRA, one row each in results/DATE_NAME/: training and
# held-out loss, epsilon, delta, time, peak memory.
#
#   bash scripts/author_table.sh [OPTIONS] [MODEL...] [-- FLAGS OF src/fine-tune-dp.py]
#
#   MODEL            gpt2 (default), gpt2-medium, gpt2-large, gpt2-xl, or a folder in Hugging Face's layout
#   --epsilon E      one or more of: a number (default 8), inf (no privacy), 0 (the model as it is, untrained)
#   --method M       one or both of: full, lora (default: both)
#   --seeds S        one or more (default 42); a seed chooses the held-out authors too
#   --nproc N        processes (default: the GPUs, or the cores where there is none)
#   --batch B        expected authors a step (default 1024); accumulation keeps it, whatever the number of processes
#   --train_file F   JSON lines with an author and a content (default data/reddit/train.jsonl, made where it is missing)
#   --vocab DIR      folder of encoder.json and vocab.bpe (default: vocab, fetched where it is missing)
#   --mirror DIR     where to copy vocabulary and checkpoints from, in place of downloading them
#   --name NAME      of the table (default author); --results DIR: where results go (default results);
#                    --runs DIR: where trainings go (default trained_models/table_NAME)
#   --dry-run        print the commands
#
# Several values stand in one word: --epsilon "8 inf". Flags behind -- are the last word of every training, such as
# -- --num_train_epochs 20 --learning_rate 1e-3. The same command goes on where it stopped or was killed. Other seeds or
# budgets under the same --name add rows. A small corpus (Shakespeare's 299 speakers), four texts of an author a step:
#   bash scripts/author_table.sh --train_file plays.jsonl --name plays-4 --batch 64 --method full --epsilon "0 8 inf" \
#       --seeds "1 2 3" MODEL -- --samples_per_author 4 --learning_rate 1e-3 --lr_scheduler_type linear \
#       --sequence_len 32 --eval_fraction 0.1 --num_train_epochs 10
# and --method lora --epsilon "8 inf" with --learning_rate 1e-2. Of so few authors a table compares methods and is no
# example of a private release: delta = 1/N is 4e-3, which publishing all of one author, drawn at random, would keep.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"
EPSILONS=(8) METHODS=(full lora) SEEDS=(42) BATCH=1024 NAME=author
TRAIN_FILE=data/reddit/train.jsonl VOCAB=vocab MIRROR=""

own_option() {
    case "$1" in
        --train_file) TRAIN_FILE="$(from_root "$2")" ;;
        --vocab) VOCAB="$(from_root "$2")" ;;
        --mirror) MIRROR="$(from_root "$2")" ;;
        *) return 1 ;;
    esac
}
parse_options "$@"
[[ " ${EPSILONS[*]} " != *" published "* ]] || die "--epsilon published: is 8 here"
[ ${#MODELS[@]} -gt 0 ] || MODELS=(gpt2)
for index in "${!MODELS[@]}"; do
    case "${MODELS[index]}" in
        gpt2 | gpt2-medium | gpt2-large | gpt2-xl) ;;
        *) MODELS[index]="$(from_root "${MODELS[index]}")"
           [ -d "${MODELS[index]}" ] || die "${MODELS[index]}: no such model or folder; wanted gpt2, gpt2-medium," \
               "gpt2-large, gpt2-xl or a folder in Hugging Face's layout" ;;
    esac
done
refuse_extra "this script sets it; use --epsilon, --seeds, --batch, --train_file, --vocab, --method or MODEL" \
    --per_device_train_batch_size --gradient_accumulation_steps --noise_multiplier --target_epsilon --disable_dp \
    --seed --train_file --vocab --model_name --output_dir --resume --resume_from_checkpoint --dry_run --enable_lora

# prepare: corpus, vocabulary and checkpoints, where they are not there yet.
prepare() {
    local model
    if [ "$VOCAB" = vocab ]; then start bash scripts/download_vocab.sh ${MIRROR:+--mirror "$MIRROR"}; fi
    if [ "$TRAIN_FILE" = data/reddit/train.jsonl ] && [ ! -f "$TRAIN_FILE" ]; then
        start python scripts/prepare_reddit.py
    fi
    [ -n "$DRY" ] || [ ! -f "$TRAIN_FILE" ] || keep "$RUNS/made_of.txt" "$(sha256sum "$TRAIN_FILE")"
    for model in "${MODELS[@]}"; do
        [ -e "$model" ] || [ -e "pretrained_checkpoints/$model-pytorch_model.bin" ] ||
            start bash scripts/download_pretrained_checkpoints.sh ${MIRROR:+--mirror "$MIRROR"} "$model"
    done
}

# make_run MODEL METHOD EPSILON SEED
make_run() {
    local privacy adapter=() rate=1e-4 training
    case "$3" in
        inf) privacy=(--disable_dp) ;;
        0) privacy=(--disable_dp --max_steps 1) rate=0 ;;
        *) privacy=(--target_epsilon "$3" --per_sample_max_grad_norm 1.0) ;;
    esac
    split_batch 32
    if [ "$2" != full ]; then
        split_batch 64
        adapter=(--lora_dim 4 --lora_alpha 32 --lora_dropout 0.0 --enable_lora)
        [ "$3" = 0 ] || rate=3e-4
    fi
    launch src/fine-tune-dp.py
    training=("${LAUNCH[@]}" --output_dir "$RUN" --model_name "$1" --train_file "$TRAIN_FILE" --vocab "$VOCAB"
        --sequence_len 128 --per_device_train_batch_size "$PER_DEVICE" --gradient_accumulation_steps "$ACCUMULATION"
        --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64
        --eval_accumulation_steps 1 --seed "$4" --prediction_loss_only --weight_decay 0.01
        --remove_unused_columns False --num_train_epochs 3 --logging_steps 5 --max_grad_norm 0
        --lr_scheduler_type constant --learning_rate "$rate" --disable_tqdm True --label_names labels
        --dataloader_num_workers 2 "${adapter[@]}" "${EXTRA[@]}" "${privacy[@]}")
    [ "$3" != 0 ] || training+=(--learning_rate 0)  # whatever stood behind --
    begin "$(quoted "${training[@]}")" || return 0
    train "${training[@]}"
}

make_table author
