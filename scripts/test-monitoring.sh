#!/usr/bin/env bash
# promtool on what a coordinator tells Prometheus, on the alert rules, and on the dashboard's queries. PROMTOOL: which one; else the installed one, or
# that of Debian's package "prometheus", which is unpacked below target/ and not installed.
set -euo pipefail
cd "$(dirname "$0")/.."

work=${CARGO_TARGET_DIR:-target}/monitoring
mkdir -p "$work"
work=$(cd "$work" && pwd)
promtool=${PROMTOOL:-$(command -v promtool || true)}
if [ -z "$promtool" ]; then
    promtool=$work/package/usr/bin/promtool
    if [ ! -x "$promtool" ]; then
        (cd "$work" && apt-get download --quiet=2 prometheus && dpkg -x prometheus_*.deb package) ||
            { echo "ella: no promtool: install Debian's package prometheus, or set PROMTOOL" >&2; exit 1; }
    fi
fi

ELLA_METRICS_OUT=$work ${CARGO:-cargo} test --quiet --release --locked -p ella-coordinator --test metrics
for text in run large job; do
    echo "metrics of a $text:"
    "$promtool" check metrics <"$work/$text"
done
python3 - "$work" <<'PYTHON'
import json
import pathlib
import sys

work, folder = pathlib.Path(sys.argv[1]), pathlib.Path("k8s/components/prometheus")
# What is under `spec` is a rule file as Prometheus has it.
lines = (folder / "rules.yaml").read_text().splitlines()
spec = [line[2:] for line in lines[lines.index("spec:") + 1:]]
(work / "rules.yaml").write_text("\n".join(spec) + "\n")
# A recording rule for each query, with Grafana's variables filled in.
dashboard = json.loads((folder / "dashboard.json").read_text())
queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
filled = [query.replace("$__rate_interval", "5m").replace("$job", "j").replace("$instance", "i") for query in queries]
rules = [{"record": f"ella:query_{number}", "expr": query} for number, query in enumerate(filled)]
(work / "dashboard.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
PYTHON
"$promtool" check rules "$work/rules.yaml" "$work/dashboard.yaml"
