#!/usr/bin/env bash
# From a fresh clone to a table of scores with its epsilon, offline but for the package registry: sets up .venv, then
# data -> DP-LoRA fine-tuning (2 processes) -> beam search -> decode -> scores, on what the repository carries: a GPT-2
# at several budgets, and a Llama at epsilon 8, with half of its epochs. Computes everything anew each time, in
# quickstart_runs/. At most 5 minutes on 2 cores after installation (4 min 36 s on an Intel Xeon).
#
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements.txt
rm -rf quickstart_runs
options=(--name quickstart --runs quickstart_runs --results quickstart_runs --data data/demo --vocab vocab/demo
    --seeds 10 --nproc 2 --batch 512 --seq_len 256)
flags=(--lora_dim 8 --lr 0.016 --scheduler linear --adam_beta2 0.98 --weight_decay 0.0 --label_smooth 0.0 --max_epoch 4
    --log_interval 10)

# In the background, since bash hears no signal while it waits for a command in the foreground.
(trap - INT && exec bash scripts/e2e_table.sh "${options[@]}" --epsilon "0 3 8 inf" pretrained_checkpoints/demo \
    -- "${flags[@]}") &
for name in INT TERM HUP; do
    trap "kill -$name $! 2> /dev/null || true; wait $! || true; exit $((128 + $(kill -l $name)))" "$name"
done
wait $!
exec bash scripts/e2e_table.sh "${options[@]}" --epsilon 8 pretrained_checkpoints/demo-llama -- "${flags[@]}" --max_epoch 2
