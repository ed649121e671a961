#!/usr/bin/env bash
# Passes the tests: tests/run.sh, or tests/run.sh tests/models -k golden. Makes .venv on first use.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
setup_environment "$root" requirements-test.txt
cd "$root"
exec python -m pytest "$@"
