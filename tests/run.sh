#!/usr/bin/env bash
# Sets up what the tests need on a fresh machine, then runs ruff and pytest, one process per core.
#   bash tests/run.sh               the quick tests
#   bash tests/run.sh --all         the slow ones too; this is what continuous integration runs
#   bash tests/run.sh -k tokenizer  other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source dev/setup.sh dev
ruff check .
# The tests of the Mamba kernels run mamba-ssm's own files in Triton's interpreter, which exists for Linux only.
if [ "$(uname)" = Linux ] && ! out=$(python -m scripts.get_kernels 2>&1); then
    echo "the tests of the Mamba kernels will be skipped: ${out##*$'\n'}"
fi
# Two threads per process would only wait for each other's cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n auto --dist worksteal "$@"
