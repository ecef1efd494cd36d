#!/usr/bin/env bash
# Makes the image ella-base:bookworm, Debian 12 and no more, from Debian's packages: for machines that reach no registry. As root.
set -euo pipefail
docker=${DOCKER:-docker}
! "$docker" image inspect ella-base:bookworm >/dev/null 2>&1 || exit 0
command -v debootstrap >/dev/null || { echo "debootstrap is missing: apt-get install debootstrap" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/root" >"$folder/log" 2>&1 || { tail -n 5 "$folder/log" >&2; exit 1; }
rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/*
tar -C "$folder/root" -c . | "$docker" import --change 'CMD ["bash"]' - ella-base:bookworm >/dev/null
