#!/usr/bin/env bash
# Builds ella's images with the Docker of this machine: scripts/images.sh [coordinator|worker|worker-cuda]..., all three if none is named.
#
#   TAG         theirs: ella-coordinator:TAG ...; left out: ella's version
#   BASE        what they stand on (debian:12-slim): any image with Debian 12's libc or a newer one
#   RUST        what ella is compiled in (rust:1.95-slim-bookworm)
#   PREBUILT=1  compile here, on this machine, instead: it must have a libc no newer than the base's
#   DOCKER      the command (docker); DOCKER_FLAGS: more of its flags, such as --network host
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'ella: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || die "$docker is missing: install Docker (Debian: apt-get install docker.io)"
"$docker" info >/dev/null 2>&1 || die "$docker reaches no Docker engine: start it, or become a member of the group docker"
kinds=("$@")
[ $# -gt 0 ] || kinds=(coordinator worker worker-cuda)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
tag=${TAG:-$version}
base=${BASE:-debian:12-slim}

label() { labels+=(--label "org.opencontainers.image.$1=$2"); }
build() { # kind context
    labels=()
    label title "ella-$1"
    label description "ella's $1: trains connectors between a language model and a frozen diffusion U-Net"
    label version "$version"
    label revision "$revision"
    label licenses Apache-2.0
    label base.name "$base"
    say "building ella-$1:$tag"
    # shellcheck disable=SC2086 # flags are words
    DOCKER_BUILDKIT=1 "$docker" build --target "$1" --tag "ella-$1:$tag" --file k8s/images/Dockerfile "${labels[@]}" \
        --build-arg BASE="$base" --build-arg BINARIES="$binaries" ${RUST:+--build-arg RUST="$RUST"} ${DOCKER_FLAGS:-} "$2"
}

binaries=compiled context=.
if [ -n "${PREBUILT:-}" ]; then
    binaries=prebuilt context=${CARGO_TARGET_DIR:-target}/images
    case " ${kinds[*]} " in *" worker-cuda "*) export ELLA_LIBTORCH=cuda ;; esac
    make build
    rm -rf "$context"
    for kind in "${kinds[@]}"; do scripts/image-root.sh "$kind" "$context/$kind"; done
fi
for kind in "${kinds[@]}"; do build "$kind" "$context"; done
for kind in "${kinds[@]}"; do
    printf '%s\t%s MB\n' "ella-$kind:$tag" "$("$docker" image inspect --format '{{.Size}}' "ella-$kind:$tag" | awk '{ print int($1 / 1e6) }')"
done
