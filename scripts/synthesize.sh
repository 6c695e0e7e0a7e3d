#!/usr/bin/env bash
# Synthetic text from private text, and what it gives away: data -> training with and without privacy -> samples ->
# judgement, in one table and one page. The options: bash scripts/synthesize.sh --help
PROGRAM=synthesis exec bash "$(dirname "${BASH_SOURCE[0]}")/tables/start.sh" "$@"
