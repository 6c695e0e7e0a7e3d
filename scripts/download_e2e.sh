#!/usr/bin/env bash
# The E2E NLG data (Novikova et al., 2017; CC BY-SA 4.0) as the NLG example of LoRA publishes it, into data/e2e/.
#
#   bash scripts/download_e2e.sh [--mirror DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"
[ ${#NAMES[@]} -eq 0 ] || die "${NAMES[0]}: unknown argument; wanted [--mirror DIR]"

HOME_URL=https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e
fetch data/e2e/train.txt "$HOME_URL/train.txt" eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a
fetch data/e2e/valid.txt "$HOME_URL/valid.txt" ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d
fetch data/e2e/test.txt "$HOME_URL/test.txt" 81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13
