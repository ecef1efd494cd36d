#!/usr/bin/env bash
# A run in containers, under faults: see tests/cluster/run.py, which gets the flags given here. As root, with a Docker engine that runs. BASE: what the
# images stand on; left out, Debian 12 made by debootstrap, so that no image registry is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

export DOCKER=${DOCKER:-docker} TAG=test
"$DOCKER" info >/dev/null 2>&1 || { echo "ella: no Docker engine answers: install docker.io, and start it (dockerd, or systemctl start docker)" >&2; exit 1; }
if [ -z "${BASE:-}" ]; then
    tests/cluster/base.sh
    export BASE=ella-base:bookworm
fi
export PREBUILT=1
scripts/images.sh coordinator worker
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp /etc/ssl/certs/ca-certificates.crt tests/cluster/s3.Dockerfile "$context/"
DOCKER_BUILDKIT=1 "$DOCKER" build --network host --tag ella-s3:$TAG --build-arg BASE="$BASE" --file "$context/s3.Dockerfile" "$context"
target=${CARGO_TARGET_DIR:-target}
python3 tests/cluster/run.py --tag $TAG --ella "$target/release/ella" --out "$target/cluster" "$@"
