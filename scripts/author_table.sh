#!/usr/bin/env bash
# The author-level experiment as a table: full fine-tuning and LoRA, one row each in results/DATE_NAME/: training and
# held-out loss, epsilon, delta, time, peak memory. The options: bash scripts/author_table.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/tables/start.sh" author "$@"
