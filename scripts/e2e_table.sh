#!/usr/bin/env bash
# The E2E experiment as a table: for each model the four published steps (training, beam search, decoding, scores), one
# row each in results/DATE_NAME/. The options: bash scripts/e2e_table.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/tables/start.sh" e2e "$@"
