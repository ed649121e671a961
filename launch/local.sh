#!/usr/bin/env bash
# Trains on this machine: launch/local.sh --config=configs/i2i.py:desk --workdir=runs/desk
# Needs Python 3.11 or newer and nothing else: makes .venv on first use, with jax for the hardware found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
setup_environment "$root" requirements.txt
exec python -m lumos_jax.main "$@"
