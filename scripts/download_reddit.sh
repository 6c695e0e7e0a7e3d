#!/usr/bin/env bash
# The Webis-TLDR-17 corpus (Völske et al., 2017): Reddit posts with their authors, an archive of 3.1 GB, into
# data/reddit/. It is never unpacked: scripts/prepare_reddit.py reads from it what training needs, and calls this script
# where the archive is not there.
#
#   bash scripts/download_reddit.sh [--mirror DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
parse_arguments "$@"
[ ${#NAMES[@]} -eq 0 ] || die "${NAMES[0]}: unknown argument; wanted [--mirror DIR]"

# The sha256 is the one that Hugging Face's data set "reddit" has on record for this address.
fetch data/reddit/corpus-webis-tldr-17.zip \
    "https://zenodo.org/record/1043504/files/corpus-webis-tldr-17.zip?download=1" \
    c1a0f8c4374c7314d3c9ec50dd505303c536062d87037d4dca7035b89b36938a
