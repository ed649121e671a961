#!/usr/bin/env bash
# Passes the tests: tests/run.sh, or tests/run.sh tests/models -k golden. Makes .venv on first use.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
setup_environment "$root" requirements-test.txt
cd "$root"
# Files are passed whole, on up to four processes at a time; -n 0 runs all in one.
exec python -m pytest -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
