#!/usr/bin/env bash
# Measures ella on this machine's GPU, beside its peer, and writes OUT/result.json, OUT/table.md and OUT/log. See bench/results/README.md.
#
#     bench/gpu.sh OUT [--minutes 9.5] [--preset sd15|nano] [--device auto|cpu|cuda] [--micro-batch 32,64,128,16] [--only PART,...]
#
# Needs Python 3 and libtorch 2.11: LIBTORCH's, or that of the Python's own torch, or what `make` has fetched. Nothing is installed or built. What
# it measures with is bench_gpu: BENCH_GPU names it, or it lies beside this script (bench/pack.sh puts it there), or in the target folder. The
# peer needs a Python with torch and diffusers: PEERS_PYTHON, or this one; PEER_WHEELS may name a folder of wheels that it lacks.
set -euo pipefail

say() { printf 'bench/gpu.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PEERS_PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || die "$python is missing: install Python 3, or name one in PEERS_PYTHON"
mkdir -p "$out" || die "$out cannot be made"

# A wheel has torch/version.py, libtorch by itself has build-version.
is_2_11() { grep -qs "2\.11\." "$1/version.py" "$1/build-version"; }
# Where the Python's torch lies, without importing it.
find_torch='import importlib.util, os; found = importlib.util.find_spec("torch"); print(os.path.dirname(found.origin) if found else "")'

libtorch=
for folder in "${LIBTORCH:-}" "$("$python" -c "$find_torch" 2>/dev/null || true)" "$here/../.libtorch/torch"; do
    if [ -e "$folder/lib/libtorch_cpu.so" ] && is_2_11 "$folder"; then
        libtorch=$(cd "$folder" && pwd)
        break
    fi
    [ -z "$folder" ] || [ ! -d "$folder" ] || say "$folder is not libtorch 2.11: passed over"
done
[ -n "$libtorch" ] || die "no libtorch 2.11 is found: set LIBTORCH to it, or install torch 2.11 for $python"

# Not exported as LD_LIBRARY_PATH here: the peer's torch may be another one, with libraries of its own.
libraries=$libtorch/lib
for folder in "$libtorch"/../nvidia/*/lib; do
    [ ! -d "$folder" ] || libraries=$libraries:$(cd "$folder" && pwd)
done

# Where a machine has its driver's libraries by this variable alone.
libraries=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

target=${CARGO_TARGET_DIR:-$here/../target}
binary=
for file in "${BENCH_GPU:-}" "$here/bench_gpu" "$target/release/examples/bench_gpu"; do
    if [ -n "$file" ] && [ -f "$file" ]; then
        binary=$file
        break
    fi
done
if [ -z "$binary" ] && [ -f "$here/bench_gpu.xz" ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    binary=$unpacked/bench_gpu
    # xz itself is not everywhere.
    "$python" -c 'import lzma, sys; open(sys.argv[2], "wb").write(lzma.open(sys.argv[1]).read())' "$here/bench_gpu.xz" "$binary"
fi
build="cargo build --release --locked --workspace --example bench_gpu"
[ -n "$binary" ] || die "bench_gpu is found nowhere: build it ($build), or name it in BENCH_GPU"
[ -x "$binary" ] || chmod +x "$binary"

goldens=
for folder in "$here/goldens" "$here/../model/tests/goldens"; do
    [ ! -d "$folder" ] || { goldens=$folder; break; }
done

described() { git -C "$here" describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown; }
commit=${ELLA_COMMIT:-$(cat "$here/commit" 2>/dev/null || described)}

"$python" "$here/gpu_parts.py" --out "$out" --binary "$binary" --libtorch "$libtorch" --libraries "$libraries" --goldens "$goldens" \
    --commit "$commit" "$@"
