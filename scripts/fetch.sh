# Shared by the download scripts, which source it: fetch a file from its public home or from a local folder, whole or
# not at all, and never without its sha256. A mistake or a failure is one line on standard error and status 2.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SELF="scripts/$(basename "$0")"   # for messages that another script's user reads
MIRROR=""   # set by parse_arguments: the folder of --mirror, as an absolute path
NAMES=()    # set by parse_arguments: the other arguments

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# parse_arguments ARGUMENTS...: sets MIRROR and NAMES.
parse_arguments() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --mirror)
                [ $# -ge 2 ] || die "--mirror: wants a folder after it"
                MIRROR="${2/#~\//$HOME/}"  # the shell expands ~ neither behind = nor in quotes
                [ -d "$MIRROR" ] || die "--mirror $2: no such folder"
                MIRROR="$(cd "$MIRROR" && pwd)"
                shift 2 ;;
            --mirror=*) set -- --mirror "${1#--mirror=}" "${@:2}" ;;
            -*) die "$1: unknown flag; wanted [--mirror DIR]" ;;
            *) NAMES+=("$1"); shift ;;
        esac
    done
}

# sha256_of FILE: prints the digest.
sha256_of() {
    if command -v sha256sum > /dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# matches FILE SHA256: FILE exists and has this digest; for - any.
matches() {
    [ -f "$1" ] && { [ "$2" = - ] || [ "$(sha256_of "$1")" = "$2" ]; }
}

# find_in_mirror NAME...: prints the files below MIRROR whose path ends in one of the names, a line each.
find_in_mirror() {
    local name
    for name in "$@"; do
        find -L "$MIRROR" -type f -path "*/$name" 2> /dev/null | sort
    done
}

# download URL PARTIAL: fetch URL into PARTIAL, going on where an earlier call stopped.
download() {
    local url="$1" partial="$2" message status=0 code
    command -v curl > /dev/null || die "curl is not installed; install it, or give $SELF --mirror DIR"
    local options=(--fail --location --connect-timeout 20 --speed-limit 1000 --speed-time 60 --retry 3
                   --continue-at - --output "$partial" --write-out '%{http_code}' "$url")
    if [ -t 2 ]; then
        code="$(curl --progress-bar "${options[@]}")" || status=$?
        message="see above"
    else
        { code="$(curl --silent --show-error "${options[@]}" 2> "$partial.log")" || status=$?; }
        message="$(tail -n 1 "$partial.log")"
        rm -f "$partial.log"
    fi
    # 416: nothing lies beyond the part we have, though its digest is wrong (curl calls that a success); 33: the home
    # cannot resume. Start afresh, once.
    if [ -s "$partial" ] && { [ "$code" = 416 ] || [ "$status" -eq 33 ]; }; then
        rm -f "$partial"
        download "$url" "$partial"
        return
    fi
    [ "$status" -eq 0 ] || die "cannot download $url (${message:-curl status $status}); connect to the network and" \
        "run again (what has come is kept), or give $SELF --mirror DIR"
}

# fetch DESTINATION URL SHA256 [NAME...]: DESTINATION (relative to the repository) has the digest when this returns.
# From a mirror, the file is found by DESTINATION's own name or by one of the names. SHA256 - is for what the caller
# checks: then the names alone find it.
fetch() {
    local name="$1" destination="$ROOT/$1" url="$2" digest="$3" checked=", sha256 as expected" partial found candidate
    shift 3
    if [ "$digest" = - ]; then checked=""; else set -- "$(basename "$name")" "$@"; fi
    if matches "$destination" "$digest"; then
        echo "$name: already there$checked"
        return
    fi
    [ ! -e "$destination" ] || die "$name: is there with another sha256 than $digest; move it away and run again"
    mkdir -p "$(dirname "$destination")" 2> /dev/null || die "$(dirname "$name"): cannot be made"
    partial="$destination.partial"
    if [ -n "$MIRROR" ]; then
        partial="$destination.copy.partial"  # not the part of a download, which a later run can go on with
        rm -f "$partial"
        found=""
        while IFS= read -r candidate; do
            found="$candidate"
            matches "$candidate" "$digest" || continue
            cp "$candidate" "$partial" 2> /dev/null ||
                { rm -f "$partial"; die "$name: cannot be copied from $candidate"; }
            break
        done < <(find_in_mirror "$@")
        [ -n "$found" ] || die "--mirror $MIRROR: holds no $1"
        [ -f "$partial" ] || die "--mirror $MIRROR: $found does not have the sha256 $digest"
    elif [ "$digest" = - ] || ! matches "$partial" "$digest"; then
        download "$url" "$partial"
    fi
    if ! matches "$partial" "$digest"; then
        found="$(sha256_of "$partial")"
        rm -f "$partial"
        die "$name: what came has the sha256 $found, wanted $digest; removed, run again"
    fi
    mv "$partial" "$destination"
    echo "$name: fetched$checked"
}
