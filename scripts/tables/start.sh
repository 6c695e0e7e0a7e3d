# bash scripts/tables/start.sh ARGUMENTS...: finds the Python and becomes scripts/start.py runner TASK ARGUMENTS..., or
# the program that the variable PROGRAM names.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
export PYTHON
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || {
    echo "error: PYTHON=$PYTHON: is no Python 3.11 or newer; name another by this variable" >&2
    exit 2
}
exec "$PYTHON" "$ROOT/scripts/start.py" "${PROGRAM:-runner}" "$@"
