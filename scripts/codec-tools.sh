#!/usr/bin/env bash
# What building the JPEG library needs beside a C compiler: cmake, and nasm for its SIMD code on x86. Installs what is missing where it
# can: from apt as root, else cmake from PyPI into .tools/. Without nasm the build still works, and is slower at pictures: said once.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.tools/bin

say() { printf 'ella: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
here() { command -v "$1" >/dev/null 2>&1; }

needs_nasm() { case "$(uname -m)" in x86_64 | i?86) ! here nasm ;; *) false ;; esac; }
missing=()
here cmake || missing+=(cmake)
! needs_nasm || missing+=(nasm)

if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && here apt-get; then
    say "installing ${missing[*]} (apt-get), once"
    get() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1; }
    # The lists of a fresh machine are empty. What fails here is said below.
    get || { apt-get update >/dev/null 2>&1 && get; } || true
fi

if ! here cmake; then
    here python3 && python3 -m pip --version >/dev/null 2>&1 || die "cmake is missing: install it (Debian: apt-get install cmake), or Python 3 with pip to fetch it"
    say "fetching cmake, once"
    rm -rf .tools/python
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --require-hashes --only-binary=:all: \
        --target .tools/python --requirement scripts/cmake-requirements.txt >&2 \
        || die "pip could not install cmake: install it (Debian: apt-get install cmake)"
    mkdir -p .tools/bin
    ln -sf ../python/cmake/data/bin/cmake .tools/bin/cmake
    say "cmake is in .tools/bin: cargo called without make needs it on its PATH"
fi

if needs_nasm; then
    [ -e .tools/without-simd ] || say "nasm is missing: JPEG pictures are prepared without SIMD, at less than half the speed. Install it (Debian: apt-get install nasm) and build again"
    mkdir -p .tools
    touch .tools/without-simd
elif [ -e .tools/without-simd ]; then
    # Cargo does not know that the library would come out otherwise now.
    cargo clean --quiet --release -p turbojpeg-sys
    rm .tools/without-simd
fi
