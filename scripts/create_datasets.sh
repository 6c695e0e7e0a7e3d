#!/usr/bin/env bash
# From nothing to data/SET/{train,valid,test}.jsonl: fetches the data and GPT-2's vocabulary where they are missing,
# then makes X_formatted.jsonl and X.jsonl of each part. What is already made is checked and kept.
#
#   bash scripts/create_datasets.sh [--mirror DIR] [e2e] [webnlg] [dart]     (default: e2e)
#
# All three are the files of LoRA's NLG example. webnlg is WebNLG 2017 (Gardent et al., 2017; CC BY-NC-SA 4.0): not its
# files but what they say is checked, the sha256 of the formatted training and validation texts, and the number of test
# texts. A mirror has them in a folder webnlg or webnlg_challenge_2017. dart is DART v1.1.1 (Nan et al., 2021; MIT) as
# first published, 12,552 test texts; its sha256 are those that Hugging Face's data set "dart" has on record.
#
# Python is .venv's where there is one, else python3; the variable PYTHON names another.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"
for name in "${NAMES[@]}"; do
    [[ "$name" =~ ^(e2e|webnlg|dart)$ ]] || die "$name: unknown data set; wanted [--mirror DIR] [e2e] [webnlg] [dart]"
done
[ ${#NAMES[@]} -gt 0 ] || NAMES=(e2e)

if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
command -v "$PYTHON" > /dev/null || die "PYTHON=$PYTHON: no such program"

# make_file NAME SHA256 SOURCE COMMAND...: run COMMAND, which makes data/NAME of SOURCE whole, unless the right file is
# there: the one with the sha256 or, where that is -, one that is newer than SOURCE.
make_file() {
    local file="$ROOT/data/$1" digest="$2"
    if matches "$file" "$digest" && { [ "$digest" != - ] || [ "$file" -nt "$3" ]; }; then
        echo "data/$1: already made"
        return
    fi
    "${@:4}"
    matches "$file" "$digest" || die "data/$1: has the sha256 $(sha256_of "$file"), wanted" \
        "$digest: ${3#"$ROOT/"} does not say what it should; move it away and run again"
}

# make_part SET PART SOURCE SHA256_FORMATTED SHA256_TOKENS
make_part() {
    local source="$ROOT/data/$1/$3" part="$ROOT/data/$1/$2"
    make_file "$1/$2_formatted.jsonl" "$4" "$source" \
        "$PYTHON" "$ROOT/src/format_converting_$1.py" "$source" "${part}_formatted.jsonl"
    make_file "$1/$2.jsonl" "$5" "${part}_formatted.jsonl" \
        "$PYTHON" "$ROOT/src/gpt2_encode.py" --vocab "$ROOT/vocab" --add_bos --add_eos \
        --input "${part}_formatted.jsonl" --output "$part.jsonl"
}

make_e2e() {
    bash "$ROOT/scripts/download_e2e.sh" ${MIRROR:+--mirror "$MIRROR"}
    bash "$ROOT/scripts/download_vocab.sh" ${MIRROR:+--mirror "$MIRROR"}
    make_part e2e train train.txt c17ccba9343fb718710d9cd8a510352fd16db22144861e12fb1bfad950cdd5d4 \
        dbc41b098ac523651894eabb7fe140f272445efe3bb4654d4666f2a1976c86b2
    make_part e2e valid valid.txt b8aea8e7c862d1c3db3279bb494131d838e0fb1223597ed070f3cf9dde50ed69 \
        05b3cbed305f639030c0cba1d437f4fe200c8f55d1f8e15b4c47eac54eb73005
    make_part e2e test test.txt 9f774414e4dc88271fa2982ec21c8c1e2344c6c54d474e0e3ef8c8d677a49c9c \
        32b4c41133c61d714642e128498a153b1864390f3b353981a95b62b442fbe07d
}

make_webnlg() {
    local home=https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/webnlg_challenge_2017 part texts
    bash "$ROOT/scripts/download_vocab.sh" ${MIRROR:+--mirror "$MIRROR"}
    for part in train dev test; do
        fetch "data/webnlg/$part.json" "$home/$part.json" - "webnlg/$part.json" "webnlg_challenge_2017/$part.json"
    done
    make_part webnlg train train.json 1b1f3d9e702d148e99d5ff0dab83732ff772a2c384700fca417e60a52b2647f7 \
        feec32171fe8f2c63b3f982df75f8cf2456fe47fd3fb1d1c024b311c279ee652
    make_part webnlg valid dev.json f92c32802d38cb520103e6edaa620da31b11db399fc81db8d02f83e7af33d3cd \
        ea13cfdc7352c296c79e89c1df2bbd59b5f4f298c8265e8c40decdd3cf22b972
    make_part webnlg test test.json - -
    texts="$(wc -l < "$ROOT/data/webnlg/test_formatted.jsonl")"
    [ "$texts" -ne 4928 ] || return 0
    die "data/webnlg/test.json: holds $texts texts that were judged good, wanted the 4928 of the challenge's test" \
        "set; move it away and run again"
}

make_dart() {
    local home=https://raw.githubusercontent.com/microsoft/LoRA/b91a3d92224f6bf1d0582b8062a7d0a3058e7ea2/data/dart
    local train=dart-v1.1.1-full-train.json dev=dart-v1.1.1-full-dev.json test=dart-v1.1.1-full-test.json
    bash "$ROOT/scripts/download_vocab.sh" ${MIRROR:+--mirror "$MIRROR"}
    fetch "data/dart/$train" "$home/$train" 0671b56f4b090ccf1c0187364d45c6f1214421d6f1081a21800596860f314e70
    fetch "data/dart/$dev" "$home/$dev" 5038f3543b6d59b94ac4e3f69d15a0b01d8578913f862142e7c560200dd6e434
    fetch "data/dart/$test" "$home/$test" c772553b482dd5fc7b8ad90d68889062a2603e28d4449ee1f162006819e0565e
    make_part dart train "$train" - -
    make_part dart valid "$dev" - -
    make_part dart test "$test" - -
}

for name in "${NAMES[@]}"; do "make_$name"; done
