#!/usr/bin/env bash
# Compares ella with diffusers and transformers at full size: an SD 1.5 U-Net and a Flan-T5-XL encoder with random weights.
# PARITY_PYTHON names a Python that has scripts/parity-requirements.txt already; else they are installed into .parity/, once.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'ella: %s\n' "$*" >&2; }
room=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
memory=$(awk '/MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
[ "$memory" -ge 14 ] || { say "the reference needs 14 GiB of free memory here, $memory GiB are free"; exit 1; }
[ "$room" -ge 6 ] || { say "the models need 6 GiB of free disk here, $room GiB are left"; exit 1; }

python=${PARITY_PYTHON:-.parity/bin/python}
if [ -z "${PARITY_PYTHON:-}" ] && ! cmp -s scripts/parity-requirements.txt .parity/installed; then
    say "fetching torch, diffusers and transformers into .parity/, once"
    rm -rf .parity
    python3 -m venv .parity || { say "Python's venv is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
    .parity/bin/pip install --quiet --disable-pip-version-check --requirement scripts/parity-requirements.txt
    cp scripts/parity-requirements.txt .parity/installed
fi
exec "$python" scripts/parity_full.py --ella "${CARGO_TARGET_DIR:-target}/release/ella" "$@"
