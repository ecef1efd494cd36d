#!/usr/bin/env bash
# Builds the docs into target/book/ (or CARGO_TARGET_DIR's), with the mdBook of .tools/, which is compiled there once.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.5.4
mdbook=.tools/bin/mdbook
if [ "$($mdbook --version 2>/dev/null)" != "mdbook v$version" ]; then
    echo "ella: compiling mdBook $version into .tools/, once: this takes minutes" >&2
    ${CARGO:-cargo} install --quiet --locked --root .tools --version $version --no-default-features --features search mdbook
fi
book=$(realpath -m "${CARGO_TARGET_DIR:-target}")/book
$mdbook build docs --dest-dir "$book"
echo "docs: $book/index.html"
