#!/usr/bin/env bash
# Lays out the files of an image under DEST, from what `make build` has left (the coordinator's needs no libtorch):
#
#     scripts/image-root.sh coordinator|worker|worker-cuda DEST
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'ella: %s\n' "$*" >&2; exit 1; }
[ $# -eq 2 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
kind=$1 root=$(realpath -m "$2")
case "$kind" in coordinator | worker | worker-cuda) ;; *) die "there is no image $kind: coordinator, worker or worker-cuda" ;; esac
built=$(realpath -m "${CARGO_TARGET_DIR:-target}")/release
[ ! -e "$root" ] || die "$root is there already"

binary() {
    [ -x "$built/$1" ] || die "$built/$1 is not there: make build"
    mkdir -p "$root/usr/local/bin"
    # Function names stay, for what a crash prints.
    strip --strip-debug -o "$root/usr/local/bin/$1" "$built/$1"
}

# Of the machine that compiles: a base may have none, or older ones.
certificates=/etc/ssl/certs/ca-certificates.crt
[ -e $certificates ] || die "$certificates is not there: install ca-certificates"
install -Dm 644 $certificates "$root$certificates"
# What tools that list an image's parts look for.
install -Dm 644 -t "$root/usr/share/doc/ella" LICENSE Cargo.lock

if [ "$kind" = coordinator ]; then
    binary ella-coordinator
    exit
fi
binary ella
binary ella-worker
install -dm 755 "$root/cache"
# The wheels' own folders, so that libraries find each other as they do there.
torch=$(realpath "${LIBTORCH:-.libtorch/torch}")
[ -e "$torch/lib/libtorch_cpu.so" ] || die "$torch/lib/libtorch_cpu.so is not there: make build"
wheels=$(dirname "$torch") to=$root/opt/libtorch
mkdir -p "$to/lib"
# What matches these patterns, in its folder: take needed|optional PATTERN...
take() {
    (
        need=$1
        shift
        cd "$wheels"
        shopt -s nullglob globstar
        for pattern; do
            # shellcheck disable=SC2206 # it is to be expanded
            files=($pattern)
            # A pattern without wildcards stays as it is.
            if [ -e "${files[0]:-}" ]; then
                cp --parents "${files[@]}" "$to"
            elif [ "$need" = needed ]; then
                die "$wheels/$pattern: nothing is there of this name, and the image needs it: make libtorch, or correct LIBTORCH"
            fi
        done
    )
}
take needed torch/version.py "torch/lib/lib"{c10,gomp,torch_cpu}".so*" "torch-*.dist-info/METADATA"
# A libtorch without CUDA links none of these. Whether something lacks, ldd says below.
take optional "nvidia/cu13/lib/lib"{cudart,cupti}".so.*" nvidia_cuda_{runtime,cupti}"-*.dist-info/METADATA"
if [ "$kind" = worker-cuda ]; then
    [ -e "$wheels/nvidia/cudnn" ] || die "libtorch's CUDA libraries are not there: ELLA_LIBTORCH=cuda make libtorch"
    take needed "torch/lib/lib"{c10_cuda,torch_cuda,torch_cuda_linalg,torch_nvshmem}".so" "nvidia/**/lib/*.so*" "nvidia*.dist-info/METADATA"
fi
# The compiler's, which a base may have none of, or older ones.
for library in libstdc++.so.6 libgcc_s.so.1; do
    cp -L "$(c++ -print-file-name=$library)" "$to/lib/$library"
done
missing=$(LD_LIBRARY_PATH=$to/torch/lib:$to/lib ldd "$root/usr/local/bin/ella-worker" | grep 'not found' || true)
[ -z "$missing" ] || die "libraries that the image lacks: $missing"
