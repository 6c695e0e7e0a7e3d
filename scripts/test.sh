#!/usr/bin/env bash
# Sets up .venv with requirements-dev.txt and passes the tests. Arguments go to pytest:
#   bash scripts/test.sh                 the suite of every commit
#   bash scripts/test.sh -m slow         the slow, the statistical and the large
#   bash scripts/test.sh tests/test_model.py -k merge
#   bash scripts/test.sh -n 0                in one process, as a debugger wants it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements-dev.txt
# Processes of one thread each are faster than one process of several threads: the models are small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
