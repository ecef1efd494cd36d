#!/usr/bin/env bash
# Tries stores on real servers, installed into .stores/ once: moto (S3, from PyPI) and azurite (Azure Blob, from npm). With `chaos` only what
# the processes of a job make of them under kills, and of a local folder too.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'ella: %s\n' "$*" >&2; }
versions='moto[server]==5.2.5 azurite@3.35.0'
moto=${versions% *} azurite=${versions#* }
if [ "$(cat .stores/installed 2>/dev/null)" != "$versions" ]; then
    command -v npm >/dev/null || { say "azurite needs Node.js 20 or later with npm: install it (Debian: apt-get install nodejs npm)"; exit 1; }
    say "fetching moto and azurite into .stores/, once"
    rm -rf .stores
    python3 -m venv .stores || { say "Python's venv is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
    .stores/bin/pip install --quiet --disable-pip-version-check "$moto"
    npm install --silent --no-audit --no-fund --prefix .stores "$azurite"
    echo "$versions" > .stores/installed
fi
export ELLA_TEST_STORES=1
# One after the other: each wants all cores.
chaos() { "${CARGO:-cargo}" test --release --locked --workspace --test chaos -- --nocapture --test-threads 1 "$@"; }
if [ "${1:-}" = chaos ]; then chaos; exit; fi
"${CARGO:-cargo}" test --release --locked -p ella-store --test emulators -- --nocapture
chaos server
