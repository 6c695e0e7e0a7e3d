# Sourced by the scripts that set up their own environment: makes .venv in the repository's root and installs a
# requirements file into it, once for each content of that file. Sets ROOT and PYTHON, and changes into ROOT.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"
cd "$ROOT"

# install_requirements FILE
install_requirements() {
    local stamp="$ROOT/.venv/installed-$1" python3
    if [ ! -x "$PYTHON" ]; then
        python3="$(command -v python3.11 || command -v python3 || true)"
        [ -n "$python3" ] || { echo "error: python3: not found; install Python 3.11 or newer" >&2; exit 2; }
        "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $python3 is $("$python3" --version 2>&1); wanted Python 3.11 or newer" >&2; exit 2; }
        echo "making .venv"
        "$python3" -m venv "$ROOT/.venv"
    fi
    # the stamp holds what was installed: both files, since one includes the other
    if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
        echo "installing $1"
        # torch first: with it in place, no other package's looser wish brings another build
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements.txt "$1" > "$stamp"
    fi
}
