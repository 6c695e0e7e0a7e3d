#!/usr/bin/env bash
# Author-level fine-tuning on real text: the 299 speakers of a corpus of Shakespeare's plays, 7,097 speeches, as
# {"author", "content"} lines. Full and LoRA, one text of an author a step (K = 1) and four, at epsilon 8 and without
# privacy; a row each in OUTPUT/table.md.
#
#   bash scripts/shakespeare_table.sh CORPUS.jsonl MODEL VOCAB OUTPUT [SEEDS]
#
# MODEL and VOCAB as for src/fine-tune-dp.py. SEEDS (default "1 2 3") choose the held-out speakers, a tenth or so; the
# row gives mean and standard deviation of the held-out loss over them. A run that an earlier call finished is kept,
# so calls with one seed each can share the work, and a last one with all of them makes the table. Ten minutes of one
# core a seed with a GPT-2 of 4 layers and width 128.
#
# Of N = 270 speakers 64 take part in a step (q = 0.24), and delta = 1/N = 4e-3 promises little: to publish all that
# one speaker said, drawn at random, would keep it. The table compares methods; it is no example of a private release.
set -euo pipefail
[ $# -ge 4 ] || { echo "error: wanted CORPUS.jsonl MODEL VOCAB OUTPUT [SEEDS]" >&2; exit 2; }
corpus="$1" model="$2" vocab="$3" output="$4" seeds="${5:-1 2 3}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$output"

# run NAME FLAGS...: one run for each seed, in OUTPUT/NAME-SEED; 64 expected authors a step, 10 epochs, 32 tokens a text
run() {
    local name="$1" seed folder
    shift
    for seed in $seeds; do
        folder="$output/$name-$seed"
        grep -qs final_epsilon_prv "$folder/privacy.json" && continue
        rm -rf "${folder:?}"
        "$python" "$here/src/fine-tune-dp.py" --output_dir "$folder" --model_name "$model" --vocab "$vocab" \
            --train_file "$corpus" --cache_dir "$output/cache" --seed "$seed" --eval_fraction 0.1 --sequence_len 32 \
            --per_device_train_batch_size 64 --num_train_epochs 10 --lr_scheduler_type linear --max_grad_norm 0 \
            --logging_steps 10 --save_steps 1000 --log_level warning "$@" > "$folder.log"
        tail -n 1 "$folder.log"
    done
}

# Learning rates: the better of a few on runs without privacy (full 1e-3 over 3e-3, LoRA 1e-2 over 3e-3 and 3e-2), then
# the same with it.
run untuned --disable_dp --learning_rate 0 --max_steps 1 --enable_lora --lora_dim 4
for K in 1 4; do
    full=(--samples_per_author $K --learning_rate 1e-3)
    lora=(--samples_per_author $K --learning_rate 1e-2 --enable_lora --lora_dim 4 --lora_alpha 32)
    run "full-K$K-epsilon8" "${full[@]}" --target_epsilon 8
    run "full-K$K-no_dp" "${full[@]}" --disable_dp
    run "lora-K$K-epsilon8" "${lora[@]}" --target_epsilon 8
    run "lora-K$K-no_dp" "${lora[@]}" --disable_dp
done

"$python" - "$output" "$seeds" << 'PYTHON' | tee "$output/table.md"
import json, os, statistics, sys

output, seeds = sys.argv[1], sys.argv[2].split()
names = [f"{method}-K{K}-{dp}" for K in (1, 4) for method in ("full", "lora") for dp in ("epsilon8", "no_dp")]
print("| run | train loss | held-out loss: mean (sd over seeds) | epsilon at 1/N | at 1/(10 N) | run time [s] |")
print("| --- | --- | --- | --- | --- | --- |")
for name in ["untuned", *names]:
    runs = [json.load(open(os.path.join(output, f"{name}-{seed}", "privacy.json"))) for seed in seeds]
    trained, private = name != "untuned", name.endswith("epsilon8")

    def mean(key, form):
        return format(statistics.mean(run[key] for run in runs), form)

    losses = [run["eval_loss"] for run in runs]
    spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else "one seed"
    without = "inf" if trained else "0"
    cells = [name, mean("train_loss", ".3f") if trained else "-", f"{statistics.mean(losses):.3f} ({spread})",
             *(mean(key, ".2f") if private else without for key in ("epsilon_prv", "epsilon_prv_strict")),
             mean("train_runtime", ".0f") if trained else "-"]
    print(f"| {' | '.join(cells)} |")
PYTHON
