#!/usr/bin/env bash
# Author-level fine-tuning on real text: the 299 speakers of a corpus of Shakespeare's plays, {"author", "content"} a
# line. Full and LoRA, one text of an author a step and four, at epsilon 8 and without privacy; a row each in
# OUTPUT/table.md.
#
#   bash scripts/shakespeare_table.sh CORPUS.jsonl MODEL VOCAB OUTPUT [SEEDS]
#
# MODEL and VOCAB as for src/fine-tune-dp.py. SEEDS (default "1 2 3") choose the held-out speakers, so that their spread
# can be seen; the row gives mean and standard deviation of the evaluation loss over them.
set -euo pipefail
[ $# -ge 4 ] || { echo "error: wanted CORPUS.jsonl MODEL VOCAB OUTPUT [SEEDS]" >&2; exit 2; }
corpus="$1" model="$2" vocab="$3" output="$4" seeds="${5:-1 2 3}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$output"

# run NAME FLAGS...: one run for each seed, in OUTPUT/NAME-SEED
run() {
    local name="$1" seed
    shift
    for seed in $seeds; do
        grep -qs final_epsilon_prv "$output/$name-$seed/privacy.json" && continue  # finished by an earlier call
        rm -rf "${output:?}/$name-$seed"
        "$python" "$here/src/fine-tune-dp.py" --output_dir "$output/$name-$seed" --model_name "$model" \
            --vocab "$vocab" --train_file "$corpus" --cache_dir "$output/cache" --sequence_len 128 --eval_fraction 0.1 --seed "$seed" \
            --per_device_train_batch_size 64 --num_train_epochs 20 --lr_scheduler_type linear --max_grad_norm 0 \
            --logging_steps 10 --save_steps 1000 --log_level warning "$@" > "$output/$name-$seed.log"
        tail -n 1 "$output/$name-$seed.log"
    done
}

run untuned --disable_dp --learning_rate 0 --max_steps 1 --enable_lora --lora_dim 4
for K in 1 4; do
    run "full-K$K-epsilon8" --samples_per_author $K --target_epsilon 8 --learning_rate 1e-3
    run "full-K$K-no_dp" --samples_per_author $K --disable_dp --learning_rate 1e-3
    lora=(--enable_lora --lora_dim 4 --lora_alpha 32 --samples_per_author $K --learning_rate 5e-3)
    run "lora-K$K-epsilon8" "${lora[@]}" --target_epsilon 8
    run "lora-K$K-no_dp" "${lora[@]}" --disable_dp
done

"$python" - "$output" "$seeds" << 'PYTHON' | tee "$output/table.md"
import json, os, statistics, sys

output, seeds = sys.argv[1], sys.argv[2].split()
print("| run | train loss | held-out loss: mean (sd over seeds) | epsilon at 1/N | at 1/(10 N) | run time [s] |")
print("| --- | --- | --- | --- | --- | --- |")
names = [f"{method}-K{K}-{dp}" for K in (1, 4) for method in ("full", "lora") for dp in ("epsilon8", "no_dp")]
for name in ["untuned", *names]:
    runs = [json.load(open(os.path.join(output, f"{name}-{seed}", "privacy.json"))) for seed in seeds]
    trained = name != "untuned"

    def mean(key, form):
        return format(statistics.mean(run[key] for run in runs), form) if trained else "-"

    losses = [run["eval_loss"] for run in runs]
    spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else "one seed"
    spent = [mean(key, ".2f") if name.endswith("epsilon8") else "inf" if trained else "0"
             for key in ("epsilon_prv", "epsilon_prv_strict")]
    print(f"| {name} | {mean('train_loss', '.3f')} | {statistics.mean(losses):.3f} ({spread}) | {spent[0]} | {spent[1]} | "
          f"{mean('train_runtime', '.0f')} |")
PYTHON
