#!/usr/bin/env bash
# The E2E experiment as a table: for each model the four published steps (training, beam search, decoding, scores), one
# row each in results/DATE_NAME/: BLEU, NIST, METEOR, ROUGE-L, CIDEr, epsilon, delta, time, peak memory.
#
#   bash scripts/e2e_table.sh [OPTIONS] [MODEL...] [-- FLAGS OF src/gpt2_ft.py]
#
#   MODEL          gpt2.sm gpt2.md gpt2.lg gpt2.xl (default: all four), or a folder in Hugging Face's layout
#   --epsilon E    one or more of: published (default: noise multiplier 0.6, epsilon 5.43), a number (the noise is
#                  chosen for it), inf (no privacy), 0 (the model as it is, untrained)
#   --method M     one or both of: lora (default), full
#   --seeds S      one or more (default 110)
#   --nproc N      processes (default: the GPUs, or the cores where there is none)
#   --batch B      logical batch (default 128); accumulation keeps it, whatever the number of processes
#   --seq_len T    longest example in tokens (default 512)
#   --data DIR     folder of {train,valid,test}.txt (default: data/e2e, fetched where it is missing)
#   --vocab DIR    with --data: folder of encoder.json and vocab.bpe to encode it with (default: vocab)
#   --mirror DIR   where to copy data, vocabulary and checkpoints from, in place of downloading them
#   --name NAME    of the table (default e2e); --results DIR: where results go (default results);
#                  --runs DIR: where trainings go (default trained_models/table_NAME)
#   --dry-run      print the commands
#
# Several values stand in one word: --epsilon "3 8 inf". Flags behind -- are the last word of every training, such as
# -- --lr 0.002 --max_epoch 5. The same command goes on where it stopped or was killed. Other seeds or budgets under the
# same --name add rows.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"
EPSILONS=(published) METHODS=(lora) SEEDS=(110) BATCH=128 NAME=e2e
DATA="" VOCAB="" SEQ_LEN=512 MIRROR=""

own_option() {
    case "$1" in
        --data) DATA="$(from_root "$2")" ;;
        --vocab) VOCAB="$(from_root "$2")" ;;
        --seq_len) SEQ_LEN="$2" ;;
        --mirror) MIRROR="$(from_root "$2")" ;;
        *) return 1 ;;
    esac
}
parse_options "$@"
[ ${#MODELS[@]} -gt 0 ] || MODELS=(gpt2.sm gpt2.md gpt2.lg gpt2.xl)
for index in "${!MODELS[@]}"; do
    case "${MODELS[index]}" in
        gpt2.sm | gpt2.md | gpt2.lg | gpt2.xl) ;;
        *) MODELS[index]="$(from_root "${MODELS[index]}")"
           [ -d "${MODELS[index]}" ] || die "${MODELS[index]}: no such model or folder; wanted gpt2.sm," \
               "gpt2.md, gpt2.lg, gpt2.xl or a folder in Hugging Face's layout" ;;
    esac
done
[ -n "$DATA" ] || [ -z "$VOCAB" ] ||
    die "--vocab $VOCAB: wanted --data beside it; the tokens of data/e2e are of GPT-2's vocabulary"
VOCAB="${VOCAB:-vocab}"
SOURCES=("$DATA"/{train,valid,test}.txt "$VOCAB"/{encoder.json,vocab.bpe})
[ -z "$DATA" ] || for file in "${SOURCES[@]}"; do
    [ -f "$file" ] || die "--data $DATA, --vocab $VOCAB: there is no $file; wanted {train,valid,test}.txt, and" \
        "encoder.json and vocab.bpe (GPT-2's: bash scripts/download_vocab.sh)"
done
refuse_extra "this script sets it; use --epsilon, --seeds, --batch, --seq_len, --data, --method or MODEL" \
    --train_batch_size --grad_acc --noise_multiplier --target_epsilon --random_seed --seq_len --train_data \
    --valid_data --model_card --init_checkpoint --work_dir --resume
split_batch 8  # as published, where there are 16 processes

# checkpoint_of MODEL: prints the file or folder that its training starts from.
checkpoint_of() {
    case "$1" in
        gpt2.sm) echo pretrained_checkpoints/gpt2-pytorch_model.bin ;;
        gpt2.md) echo pretrained_checkpoints/gpt2-medium-pytorch_model.bin ;;
        gpt2.lg) echo pretrained_checkpoints/gpt2-large-pytorch_model.bin ;;
        gpt2.xl) echo pretrained_checkpoints/gpt2-xl-pytorch_model.bin ;;
        *) echo "$1" ;;
    esac
}

# prepare: data, vocabulary and checkpoints, where they are not there yet.
prepare() {
    local model part file
    if [ -z "$DATA" ]; then
        start bash scripts/create_datasets.sh ${MIRROR:+--mirror "$MIRROR"}
        DATA=data/e2e TOKENS=data/e2e
    else
        TOKENS="$RUNS/data"
        if [ -z "$DRY" ]; then
            [ -f "$TOKENS/made_of.txt" ] || rm -f "$TOKENS"/*.jsonl  # of which nobody knows what they are made of
            keep "$TOKENS/made_of.txt" "$(sha256sum "${SOURCES[@]}")"
        fi
        for part in train valid test; do
            [ ! -f "$TOKENS/$part.jsonl" ] || continue
            start python src/format_converting_e2e.py "$DATA/$part.txt" "$TOKENS/${part}_formatted.jsonl"
            start python src/gpt2_encode.py --vocab "$VOCAB" --add_bos --add_eos \
                --input "$TOKENS/${part}_formatted.jsonl" --output "$TOKENS/$part.jsonl"
        done
    fi
    for model in "${MODELS[@]}"; do
        file="$(checkpoint_of "$model")"
        [ -e "$file" ] || start bash scripts/download_pretrained_checkpoints.sh ${MIRROR:+--mirror "$MIRROR"} \
            "$(basename "${file%-pytorch_model.bin}")"
    done
    # two line feeds end a text, as published: token 628 of GPT-2's vocabulary
    END=628
    [ "$VOCAB" = vocab ] || END="$("$PYTHON" -c 'import json, sys
print(json.load(open(sys.argv[1], encoding="utf-8")).get("\u010a\u010a", ""))' "$VOCAB/encoder.json" 2> /dev/null)" ||
        die "$VOCAB/encoder.json: wanted a JSON object of tokens and their numbers; make the vocabulary anew"
}

# make_run MODEL METHOD EPSILON SEED
make_run() {
    local noise adapter=(--lora_dim 0) training=() beam decode score checkpoint
    checkpoint="$(checkpoint_of "$1")"
    case "$3" in
        published) noise=(--noise_multiplier 0.6) ;;
        inf) noise=(--noise_multiplier 0) ;;
        *) noise=(--target_epsilon "$3") ;;
    esac
    [ "$2" != lora ] || adapter=(--lora_dim 4 --lora_alpha 32 --lora_dropout 0.0)
    if [ "$2" != none ]; then
        launch src/gpt2_ft.py
        training=("${LAUNCH[@]}" --train_data "$TOKENS/train.jsonl" --valid_data "$TOKENS/valid.jsonl"
            --train_batch_size "$PER_DEVICE" --grad_acc "$ACCUMULATION" "${noise[@]}" --max_grad_norm 1.0
            --valid_batch_size 4 --seq_len "$SEQ_LEN" --model_card "$1" --init_checkpoint "$checkpoint"
            --platform local --clip 0.0 --lr 0.0004 --weight_decay 0.01 --correct_bias --adam_beta2 0.999
            --scheduler constant --warmup_step 0 --max_epoch 20 --save_interval 1000 "${adapter[@]}" --label_smooth 0.1
            --work_dir "$RUN" --random_seed "$4" "${EXTRA[@]}")
        checkpoint="$RUN"
    fi
    launch src/gpt2_beam.py
    beam=("${LAUNCH[@]}" --data "$TOKENS/test.jsonl" --batch_size 1 --seq_len "$SEQ_LEN" --eval_len 64 --model_card "$1"
        --init_checkpoint "$checkpoint" --platform local --beam 10 --length_penalty 0.8 --no_repeat_ngram_size 4
        --repetition_penalty 1.0 ${END:+--eos_token_id "$END"} --work_dir "$RUN" --output_file predict.jsonl)
    decode=(python src/gpt2_decode.py --vocab "$VOCAB" --sample_file "$RUN/predict.jsonl"
        --input_file "$TOKENS/test_formatted.jsonl" --output_ref_file "$RUN/e2e_ref.txt"
        --output_pred_file "$RUN/e2e_pred.txt")
    score=(python eval/e2e/measure_scores.py "$RUN/e2e_ref.txt" "$RUN/e2e_pred.txt" -p --json "$RUN/scores.json")
    begin "# data: $DATA, vocabulary: $VOCAB" "$(quoted "${training[@]}")" "$(quoted "${beam[@]}")" \
        "$(quoted "${decode[@]}")" "$(quoted "${score[@]}")" || return 0
    [ "$2" = none ] || train "${training[@]}"
    if [ -n "$DRY" ] || [ ! -f "$RUN/predict.jsonl" ]; then
        if [ -z "$DRY" ] && compgen -G "$RUN/predict.jsonl.journal.*" > /dev/null; then beam+=(--resume); fi
        start "${beam[@]}"
    fi
    start "${decode[@]}"
    if [ -n "$DRY" ] || [ ! -f "$RUN/scores.json" ]; then start "${score[@]}"; fi
}

make_table e2e
