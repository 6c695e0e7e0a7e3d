#!/usr/bin/env bash
# OpenAI's GPT-2 checkpoints in Hugging Face's format, into pretrained_checkpoints/NAME-pytorch_model.bin.
#
#   bash scripts/download_pretrained_checkpoints.sh [--mirror DIR] [gpt2] [gpt2-medium] [gpt2-large] [gpt2-xl]
#
# Without a name: all four (0.5, 1.5, 3.2 and 6.4 GB). The revisions are pinned. gpt2's sha256 stands below; the digests
# of the other three are not known to this script: they are read from the hub's Git LFS pointer of the pinned revision
# (which proves that the file came whole, not that the hub is honest) and kept beside the checkpoint as
# NAME-pytorch_model.bin.sha256. A mirror needs that file for them too, since it has no pointer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"

HUB=https://huggingface.co/openai-community

# fetch_checkpoint NAME REVISION [SHA256]
fetch_checkpoint() {
    local name="$1" revision="$2" digest="${3:-}" pointer file="pretrained_checkpoints/$1-pytorch_model.bin" noted
    if [ -z "$digest" ]; then
        mkdir -p "$ROOT/pretrained_checkpoints" 2> /dev/null || die "pretrained_checkpoints: cannot be made"
        if [ -n "$MIRROR" ]; then
            noted="$(find_in_mirror "$name-pytorch_model.bin.sha256" | head -n 1)"
            [ -n "$noted" ] || die "--mirror $MIRROR: holds no $name-pytorch_model.bin.sha256 to check the" \
                "checkpoint by; make it with sha256sum from a file that you trust"
        else
            noted="$ROOT/$file.sha256"
            if [ ! -f "$noted" ]; then
                pointer="$ROOT/$file.pointer.partial"
                rm -f "$pointer"
                download "$HUB/$name/raw/$revision/pytorch_model.bin" "$pointer"
                sed -n 's/^oid sha256:\([0-9a-f]\{64\}\)$/\1/p' "$pointer" > "$noted.partial"
                rm -f "$pointer"
                [ -s "$noted.partial" ] || { rm -f "$noted.partial"; die "$HUB/$name: did not send a Git LFS pointer"; }
                mv "$noted.partial" "$noted"
            fi
        fi
        digest="$(head -n 1 "$noted" | cut -d ' ' -f 1)"
        [[ "$digest" =~ ^[0-9a-f]{64}$ ]] || die "$noted: does not begin with a sha256"
    fi
    fetch "$file" "$HUB/$name/resolve/$revision/pytorch_model.bin" "$digest" "$name/pytorch_model.bin"
    [ -n "${3:-}" ] || [ -f "$ROOT/$file.sha256" ] || echo "$digest" > "$ROOT/$file.sha256"
}

[ ${#NAMES[@]} -gt 0 ] || NAMES=(gpt2 gpt2-medium gpt2-large gpt2-xl)
for name in "${NAMES[@]}"; do
    case "$name" in gpt2 | gpt2-medium | gpt2-large | gpt2-xl) ;;
        *) die "$name: unknown checkpoint; wanted gpt2, gpt2-medium, gpt2-large or gpt2-xl" ;;
    esac
done
for name in "${NAMES[@]}"; do
    case "$name" in
        gpt2)
            fetch_checkpoint gpt2 607a30d783dfa663caf39e06633721c8d4cfcd7e \
                7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421 ;;
        gpt2-medium) fetch_checkpoint gpt2-medium 6dcaa7a952f72f9298047fd5137cd6e4f05f41da ;;
        gpt2-large) fetch_checkpoint gpt2-large 32b71b12589c2f8d625668d2335a01cac3249519 ;;
        gpt2-xl) fetch_checkpoint gpt2-xl 15ea56dee5df4983c59b2538573817e1667135e2 ;;
    esac
done
