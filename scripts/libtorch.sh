#!/usr/bin/env bash
# Puts libtorch where the build looks for it, once: LIBTORCH if set, else torch's wheel unpacked into .libtorch/ (no Python
# packages are installed or imported; only the wheel's headers and libraries are used).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'ella: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
need() { command -v "$1" >/dev/null 2>&1 || die "$1 is missing: $2"; }

need cargo "install Rust 1.89 or newer (https://rustup.rs)"
need c++ "install a C++ compiler (Debian: apt-get install g++)"

if [ -n "${LIBTORCH:-}" ]; then
    [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || die "LIBTORCH=$LIBTORCH has no lib/libtorch_cpu.so: point it at libtorch 2.11.0, or unset it"
    exit 0
fi

lists=(scripts/libtorch-requirements.txt)
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }
# An image for machines with a GPU is built on one that has none.
case "${ELLA_LIBTORCH:-auto}" in
    cpu) ;;
    cuda) lists+=(scripts/libtorch-cuda-requirements.txt) ;;
    auto) ! has_gpu || lists+=(scripts/libtorch-cuda-requirements.txt) ;;
    *) die "ELLA_LIBTORCH=$ELLA_LIBTORCH: cpu, cuda or auto" ;;
esac
stamp=.libtorch/installed
want=$(cat "${lists[@]}" | cksum)
# An earlier version of this script left NVIDIA's folder incomplete where there was a GPU.
[ ${#lists[@]} = 1 ] || want+=" CUDA"
if [ "$(cat $stamp 2>/dev/null)" = "$want" ]; then exit 0; fi

need python3 "install Python 3 (Debian: apt-get install python3 python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || die "Python's pip is missing: install it (Debian: apt-get install python3-pip)"
room=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
need_room=$([ ${#lists[@]} -gt 1 ] && echo 12 || echo 6)
[ "$room" -ge "$need_room" ] || die "libtorch needs $need_room GiB of free disk here, $room GiB are left: free some, or set LIBTORCH"

arch=$(uname -m)
case "$arch" in x86_64 | aarch64) ;; *) die "no libtorch wheel for $arch: build libtorch 2.11.0 and set LIBTORCH" ;; esac
platforms=()
for glibc in $(seq 17 28); do platforms+=(--platform "manylinux_2_${glibc}_$arch"); done
platforms+=(--platform "manylinux2014_$arch")
log=$(mktemp)
rm -rf .libtorch.new
say "fetching libtorch (${lists[*]}), once"
# All at once: into a folder that is there, pip adds nothing to NVIDIA's. One wheel for every Python: its libraries are the same, and no Python ever
# imports it.
python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --no-compile --only-binary=:all: \
    --implementation cp --python-version 3.11 --abi cp311 --abi none "${platforms[@]}" \
    --target .libtorch.new "${lists[@]/#/--requirement=}" >"$log" 2>&1 \
    || { tail -n 5 "$log" >&2; rm -rf .libtorch.new; die "pip could not install libtorch: see above (a network, and PyPI or a mirror of it, is needed once)"; }
if [ ${#lists[@]} -gt 1 ]; then
    [ -d .libtorch.new/nvidia/cudnn ] || die "pip left libtorch's CUDA libraries out of .libtorch.new/nvidia: see $log"
fi
rm -f "$log"
printf '%s\n' "$want" >.libtorch.new/installed
rm -rf .libtorch
mv .libtorch.new .libtorch
