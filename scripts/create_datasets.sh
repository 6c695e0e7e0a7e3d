#!/usr/bin/env bash
# From nothing to data/e2e/{train,valid,test}.jsonl: fetches the E2E data and GPT-2's vocabulary where they are missing,
# then makes X_formatted.jsonl and X.jsonl of each part. What is already made is checked and kept.
#
#   bash scripts/create_datasets.sh [--mirror DIR]
#
# Python is .venv's where there is one, else python3; the variable PYTHON names another.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"
[ ${#NAMES[@]} -eq 0 ] || die "${NAMES[0]}: unknown argument; wanted [--mirror DIR]"

bash "$ROOT/scripts/download_e2e.sh" ${MIRROR:+--mirror "$MIRROR"}
bash "$ROOT/scripts/download_vocab.sh" ${MIRROR:+--mirror "$MIRROR"}

if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
command -v "$PYTHON" > /dev/null || die "PYTHON=$PYTHON: no such program"

# make_file NAME SHA256 COMMAND...: run COMMAND, which writes data/e2e/NAME whole, unless the right file is there.
make_file() {
    local file="$ROOT/data/e2e/$1" digest="$2"
    if matches "$file" "$digest"; then
        echo "data/e2e/$1: already made, sha256 as expected"
        return
    fi
    "${@:3}"
    matches "$file" "$digest" || die "data/e2e/$1: has the sha256 $(sha256_of "$file"), wanted $digest"
}

# make_part NAME SHA256_FORMATTED SHA256_TOKENS
make_part() {
    local part="$ROOT/data/e2e/$1"
    make_file "$1_formatted.jsonl" "$2" \
        "$PYTHON" "$ROOT/src/format_converting_e2e.py" "$part.txt" "${part}_formatted.jsonl"
    make_file "$1.jsonl" "$3" \
        "$PYTHON" "$ROOT/src/gpt2_encode.py" --vocab "$ROOT/vocab" --add_bos --add_eos \
        --input "${part}_formatted.jsonl" --output "$part.jsonl"
}

make_part train c17ccba9343fb718710d9cd8a510352fd16db22144861e12fb1bfad950cdd5d4 \
    dbc41b098ac523651894eabb7fe140f272445efe3bb4654d4666f2a1976c86b2
make_part valid b8aea8e7c862d1c3db3279bb494131d838e0fb1223597ed070f3cf9dde50ed69 \
    05b3cbed305f639030c0cba1d437f4fe200c8f55d1f8e15b4c47eac54eb73005
make_part test 9f774414e4dc88271fa2982ec21c8c1e2344c6c54d474e0e3ef8c8d677a49c9c \
    32b4c41133c61d714642e128498a153b1864390f3b353981a95b62b442fbe07d
