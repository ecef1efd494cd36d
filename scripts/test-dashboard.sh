#!/bin/sh
# The dashboard in a real Chromium: see scripts/dashboard/test.mjs. Installs playwright-core and axe-core from npm into target/dashboard/, once for each version.
# CHROMIUM names the browser (/usr/bin/chromium otherwise). Pictures for people are left in target/dashboard/shots/.
set -eu

cd "$(dirname "$0")/.."
place="${CARGO_TARGET_DIR:-target}/dashboard"
example="${CARGO_TARGET_DIR:-target}/release/examples/dashboard"

need() {
    command -v "$1" >/dev/null 2>&1 || { echo "test-dashboard: $1 is missing; on Debian: apt-get install $2" >&2; exit 1; }
}
need node nodejs
need npm npm
need "${CHROMIUM:-/usr/bin/chromium}" chromium

mkdir -p "$place"
cp scripts/dashboard/package.json scripts/dashboard/test.mjs "$place"
# Copied last: it tells which versions are there.
installed="$place/node_modules/.installed.json"
if ! cmp -s scripts/dashboard/package.json "$installed"; then
    npm install --prefix "$place" --no-audit --no-fund --loglevel=error
    cp scripts/dashboard/package.json "$installed"
fi
exec node "$place/test.mjs" "$(realpath "$example")" "$place/shots"
