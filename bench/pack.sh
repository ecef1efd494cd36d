#!/usr/bin/env bash
# Puts into FOLDER all that bench/gpu.sh needs on a GPU machine where nothing is built: copy it there, then `FOLDER/gpu.sh OUT`.
#
#     bench/pack.sh FOLDER
#
# bench_gpu must be built. PEER_PYTHON=3.12 adds the wheels that the peer needs besides torch, for that version of Python on x86-64 Linux.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'bench/pack.sh: %s\n' "$*" >&2; exit 1; }

# MiB of all that travels, so that a working tree of 22 goes with it where 64 may.
most=42
[ $# -eq 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1
[ ! -e "$folder" ] || die "$folder is there already: remove it, or name another"
binary=${CARGO_TARGET_DIR:-target}/release/examples/bench_gpu
[ -x "$binary" ] || die "$binary is not there: cargo build --release --locked --workspace --example bench_gpu"

mkdir -p "$folder"
cp bench/gpu.sh bench/gpu_parts.py bench/peer_trainer.py "$folder/"
strip -o "$folder/bench_gpu" "$binary"
# xz itself is not everywhere, and Python is needed anyway.
python3 -c 'import lzma, sys; lzma.open(sys.argv[1] + ".xz", "wb").write(open(sys.argv[1], "rb").read())' "$folder/bench_gpu"
rm "$folder/bench_gpu"
# Tests of operators, of what only a GPU can do, and of NCCL. A worker's own are 9 MiB, for which the wheels leave no room; `bench_gpu check` has its sums.
cargo test --release --locked -p ella-cuda -p nccl-rs --no-run --message-format json | python3 -c '
import json, lzma, subprocess, sys
for line in sys.stdin:
    built = json.loads(line)
    names = {"fused": "cuda_fused", "gpu": "cuda_gpu", "loaded": "nccl_loaded"}
    if built.get("executable") and "test" in built["target"]["kind"] and built["target"]["name"] in names:
        name = sys.argv[1] + "/" + names[built["target"]["name"]]
        subprocess.run(["strip", "-o", name, built["executable"]], check=True)
        lzma.open(name + ".xz", "wb").write(open(name, "rb").read())
        subprocess.run(["rm", name], check=True)
' "$folder"
for name in cuda_fused cuda_gpu nccl_loaded; do [ -e "$folder/$name.xz" ] || die "the tests $name were not built"; done
# Those of the networks that bench_gpu check runs.
mkdir "$folder/goldens"
for of in unet tsc resampler t5 clip-l clip-g vae; do cp -r "model/tests/goldens/$of"* "$folder/goldens/"; done
git describe --always --abbrev=40 --dirty --exclude '*' >"$folder/commit"
if [ -n "${PEER_PYTHON:-}" ]; then
    diffusers=$(grep -o '^diffusers==[0-9.]*' scripts/parity-requirements.txt) || die "scripts/parity-requirements.txt names no diffusers"
    python3 -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version "$PEER_PYTHON" --implementation cp \
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 \
        --dest "$folder/wheels" "$diffusers"
    # A second way to download from the hub, which nothing here does; the largest but for numpy and pillow.
    rm -f "$folder"/wheels/hf_xet-*
fi
size=$(du -sm "$folder" | cut -f1)
[ "$size" -le $most ] || die "$folder has $size MiB, more than $most: leave the wheels out (PEER_PYTHON), and have diffusers on the GPU machine"
printf 'bench/pack.sh: %s has %s MiB\n' "$folder" "$size" >&2
