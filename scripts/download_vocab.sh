#!/usr/bin/env bash
# GPT-2's byte-level BPE, as OpenAI publishes it, into vocab/.
#
#   bash scripts/download_vocab.sh [--mirror DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"
[ ${#NAMES[@]} -eq 0 ] || die "${NAMES[0]}: unknown argument; wanted [--mirror DIR]"

HOME_URL=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
fetch vocab/encoder.json "$HOME_URL/encoder.json" 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
fetch vocab/vocab.bpe "$HOME_URL/vocab.bpe" 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
