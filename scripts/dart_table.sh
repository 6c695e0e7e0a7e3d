#!/usr/bin/env bash
# DART v1.1.1 as a table: training, beam search, decoding and scores, one row each in results/DATE_NAME/. The options:
# bash scripts/dart_table.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/tables/start.sh" dart "$@"
