#!/usr/bin/env bash
# Sets up what the tests need on a fresh machine, then runs ruff and pytest.
#   bash tests/run.sh               everything
#   bash tests/run.sh -k tokenizer  arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source dev/setup.sh dev
ruff check .
exec python -m pytest "$@"
