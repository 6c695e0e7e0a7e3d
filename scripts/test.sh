#!/usr/bin/env bash
# Sets up .venv with requirements-dev.txt and passes the tests. Arguments go to pytest:
#   bash scripts/test.sh                 the suite of every commit
#   bash scripts/test.sh -m slow         the slow, the statistical and the large
#   bash scripts/test.sh tests/test_model.py -k merge
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_requirements requirements-dev.txt
# Two processes of one thread each are faster here than one of two: the models are small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest "$@"
