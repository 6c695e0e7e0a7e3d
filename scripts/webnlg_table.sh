#!/usr/bin/env bash
# WebNLG 2017 as a table: training, beam search, decoding and scores of seen, unseen and all categories, one row each in
# results/DATE_NAME/. The options: bash scripts/webnlg_table.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/tables/start.sh" webnlg "$@"
