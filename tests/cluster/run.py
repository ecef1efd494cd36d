"""A run in containers, under faults, beside the same run on this machine: the same bytes.

    tests/cluster/run.py --tag TAG --ella FILE --out FOLDER

One Docker network holds an S3 server, a coordinator and three workers, which prepare and embed a data set in a bucket and train on it. Meanwhile they are
killed, paused, cut off and told to leave. OUT/report.json says what came of each; OUT/logs has every container's log.
"""

import argparse
import json
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

from containers import DOCKER, PREEMPTED, Cluster, Failed, docker, until

NETWORK, WORKERS = "ella-test-cluster", 3
GRPC, HTTP, PEERS = 7000, 7001, 7100
GRACE = 60
S3 = {"AWS_ENDPOINT": "http://s3:5000", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
      "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "correct-horse-battery"}

RUN = """
[run]
output = "{output}"
seed = 5
[base]
model = "{models}/base"
[text]
model = "{models}/text"
max_tokens = 64
[data]
path = "{data}"
window = 2
[connector]
layers = 2
latents = 16
[train]
steps = {steps}
global_batch = 24
micro_batch = 2
eval_every = 50
eval_samples = 8
ema_decay = 0.99
[train.optimizer]
lr = 1e-3
[checkpoint]
every = 40
keep = 2
[workers]
count = {count}
lease = "3s"
orphan_timeout = "40s"
step_timeout = "20s"
join_window = "500ms"
"""


class Trial:
    """The run's containers, and what is known of them."""

    def __init__(self, options):
        self.options, self.work, self.out = options, options.out / "work", options.out
        shutil.rmtree(self.out, ignore_errors=True)
        (self.out / "logs").mkdir(parents=True)
        self.work.mkdir()
        self.cluster = Cluster(NETWORK, self.out / "logs")
        self.report = {"tag": options.tag, "steps": options.steps, "faults": []}

    def ella(self, *arguments):
        """Runs `ella` on this machine."""
        done = subprocess.run([str(self.options.ella), *map(str, arguments)], capture_output=True, text=True, timeout=1200)
        if done.returncode != 0:
            raise Failed(f"ella {' '.join(map(str, arguments))}: {done.stderr[-800:]}")
        return done.stdout

    def ella_there(self, *arguments, codes=(0,)):
        """Runs `ella` in a container on the network."""
        done = subprocess.run([DOCKER, "run", "--rm", "--network", NETWORK, "--label", NETWORK, *self.mounts(), *self.settings(),
                               "--entrypoint", "/usr/local/bin/ella", f"ella-worker:{self.options.tag}", *arguments],
                              capture_output=True, text=True, timeout=600)
        if done.returncode not in codes:
            raise Failed(f"ella {' '.join(arguments)} ended with {done.returncode}: {done.stdout[-800:]} {done.stderr[-800:]}")
        return done.stdout

    # --- what the containers are given

    def mounts(self):
        return ["--volume", f"{self.work}:/work:ro"]

    @staticmethod
    def settings(more=None):
        pairs = {**S3, "ELLA_TOKEN_FILE": "/work/token", **(more or {})}
        return [word for name, value in pairs.items() for word in ("--env", f"{name}={value}")]

    def start(self, config, seconds=60):
        """Starts a coordinator and its workers. Give their names."""
        self.cluster.add("coordinator", f"ella-coordinator:{self.options.tag}", [f"/work/{config}", "--drain-timeout", str(GRACE - 10)],
                         [*self.mounts(), *self.settings(), "--publish", f"127.0.0.1::{HTTP}"])
        for rank in range(WORKERS):
            self.start_worker(rank)
        return ["coordinator", *(f"worker-{rank}" for rank in range(WORKERS))]

    def start_worker(self, rank):
        name = f"worker-{rank}"
        settings = {"ELLA_COORDINATOR": f"http://coordinator:{GRPC}", "ELLA_ADVERTISE": name, "ELLA_CONNECT_TIMEOUT": "120"}
        self.cluster.add(name, f"ella-worker:{self.options.tag}", [], [*self.mounts(), *self.settings(settings), "--tmpfs", "/cache:uid=10001"])

    def status(self):
        """The coordinator's status, or None while it gives none."""
        try:
            port = docker("port", self.cluster.places["coordinator"].container, str(HTTP)).rsplit(":", 1)[1]
            token = (self.work / "token").read_text().strip()
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/status", headers={"authorization": f"Bearer {token}"})
            with urllib.request.urlopen(asked, timeout=3) as answer:
                return json.load(answer)
        except (OSError, Failed, IndexError, ValueError):
            return None

    # --- the parts

    def prepare_world(self):
        """The pictures and models, and the run of this machine: what the containers' is compared with."""
        work, steps = self.work, self.options.steps
        self.ella("scenes", "--out", work / "scenes", "--count", 360, "--seed", 5, "--size", 64, "--per-tar", 60)
        local = work / "local"
        prepare = [work / "scenes", "--resolution", "64", "--min-edge", "64"]
        self.ella("prepare", *prepare, "--out", local / "data")
        self.ella("init-base", "--preset", "nano", "--seed", 5, "--captions", local / "data", "--out", work / "models")
        self.ella("embed", local / "data", "--text", work / "models/text", "--max-tokens", "64")
        (work / "token").write_text(secrets.token_hex(24))
        toml = RUN.format(output=local / "run", models=work / "models", data=local / "data", steps=steps, count=1)
        (work / "local.toml").write_text(toml)
        began = time.monotonic()
        self.ella("train", work / "local.toml")
        self.report["local_seconds"] = round(time.monotonic() - began, 1)
        there = RUN.format(output="s3://ella/run", models="/work/models", data="s3://ella/data", steps=steps, count=WORKERS)
        (work / "run.toml").write_text(there)
        for path in [work, *work.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)

    def start_store(self):
        self.cluster.add("s3", f"ella-s3:{self.options.tag}", [], ["--publish", "127.0.0.1::5000"])
        port = until("the S3 server's port", lambda: docker("port", self.cluster.places["s3"].container, "5000", check=False))
        url = f"http://{port.splitlines()[0]}/ella"

        def made():
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=3).close()
                return True
            except OSError:
                return False
        until("a bucket", made)

    def job(self, kind, *arguments):
        """A job of leased units in containers, until it is done."""
        began = time.monotonic()
        # Written by the one that knows what is asked for; done by coordinator and workers.
        text = self.ella_there(kind, *arguments, "--write-job", "/dev/stdout")
        config = self.work / f"{kind}.toml"
        config.write_text(text)
        config.chmod(0o644)
        names = self.start(f"{kind}.toml")
        if kind == "prepare":
            self.cluster.wait("a unit done", lambda: (self.status() or {}).get("job", {}).get("units_done", 0) > 0 or self.is_over(names))
            docker("kill", self.cluster.places["worker-0"].container, check=False)
        self.cluster.all_done(names, 300)
        self.cluster.drop(*names)
        self.report[kind] = round(time.monotonic() - began, 1)
        say(f"{kind}: {self.report[kind]} s")

    def is_over(self, names):
        return any(self.cluster.places[name].is_done for name in names)

    def train(self):
        began = time.monotonic()
        names = self.start("run.toml")
        self.advance("the first steps", 5)
        self.look_inside()
        for what, fault in FAULTS:
            self.under(what, fault)
        self.cluster.all_done(names, 600)
        self.report["train"] = round(time.monotonic() - began, 1)
        self.report["starts"] = {name: self.cluster.places[name].starts for name in names}
        self.report["exit_codes"] = {name: self.cluster.places[name].codes for name in names}
        self.cluster.drop(*names)

    def advance(self, what, steps, seconds=180):
        """Waits until so many more steps are applied, and gives the step."""
        begin = until(f"a status ({what})", lambda: self.known(), seconds)
        return self.cluster.wait(f"{steps} steps more ({what})", lambda: (step := self.known()) and step >= begin + steps and step, seconds)

    def known(self):
        status = self.status()
        return status and status["phase"] == "training" and status["step"] + 1

    def under(self, what, fault):
        """Lets a fault befall the run, and sees it go on."""
        self.cluster.check()
        if self.is_over(["coordinator"]):
            raise Failed(f"the run was over before {what}: give more --steps")
        before, began = self.status() or {}, time.monotonic()
        fault(self)
        step = self.advance(f"after {what}", 10)
        after = self.status() or {}
        told = {"what": what, "step": step - 1, "seconds": round(time.monotonic() - began, 1),
                "generations": [before.get("generation"), after.get("generation")], "terms": [before.get("term"), after.get("term")]}
        self.report["faults"].append(told)
        say(f"{what}: goes on at step {told['step']} after {told['seconds']} s, generation {told['generations'][1]}, term {told['terms'][1]}")

    def look_inside(self):
        """That each container is what it should be: our binary as the first process, not root, nothing written, only its own ports."""
        for name, ports in (("coordinator", {GRPC, HTTP}), ("worker-1", {PEERS})):
            container = self.cluster.places[name].container
            status = inside(container, "status")
            first = inside(container, "comm").strip()
            listening = {int(line.split()[1].split(":")[1], 16) for family in ("net/tcp", "net/tcp6")
                         for line in inside(container, family).splitlines()[1:] if line.split()[3] == "0A"}
            # Docker's own resolver listens within each container, on a port of its choice.
            listening = {port for port in listening if port in {GRPC, HTTP, PEERS} or port < 1024}
            uid = next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:"))
            written = docker("diff", container)
            if not first.startswith("ella-") or uid != "10001" or listening != ports or "/usr" in written:
                raise Failed(f"{container}: first process {first}, user {uid}, ports {listening}, written {written!r}")
        say("each first process is ella's, of user 10001; it listens where it should, and has written nothing to its image")

    def compare(self):
        """The last commit's files here and there."""
        there = self.ella_there("status", "s3://ella/run", "--json")
        last = json.loads(there)["last_commit_step"]
        if last != self.options.steps:
            raise Failed(f"the containers' last commit is of step {last}")
        self.report["audit"] = json.loads(self.ella_there("audit", "s3://ella/run", "--json"))
        digests = {name: self.parts(records) for name, records in (("local", self.local_log()), ("containers", self.remote_log()))}
        self.report["digests"] = digests
        if digests["local"] != digests["containers"] or not digests["local"]:
            raise Failed(f"other bytes than the local run's: {digests}")
        say(f"{len(digests['local'])} files of the last commit have the local run's bytes")

    @staticmethod
    def parts(records):
        commits = [record["body"] for record in records if record["body"]["kind"] == "commit"]
        return {part["name"]: part["blake3"] for part in commits[-1]["parts"]} if commits else {}

    def local_log(self):
        return [json.loads(path.read_text()) for path in sorted((self.work / "local/run/log").glob("*.json"))]

    def remote_log(self):
        read = ("import boto3, json; s3 = boto3.client('s3', endpoint_url='http://127.0.0.1:5000', aws_access_key_id='a', aws_secret_access_key='b'); "
                "keys = [o['Key'] for page in s3.get_paginator('list_objects_v2').paginate(Bucket='ella', Prefix='run/log/') for o in page['Contents']]; "
                "print(json.dumps([json.load(s3.get_object(Bucket='ella', Key=key)['Body']) for key in sorted(keys)]))")
        return json.loads(docker("exec", self.cluster.places["s3"].container, "python3", "-c", read))


def inside(container, file):
    """What /proc says of a container's first process."""
    pid = docker("inspect", "--format", "{{.State.Pid}}", container)
    return pathlib.Path(f"/proc/{pid}/{file}").read_text()


def say(text):
    print(f"ella: {text}", file=sys.stderr, flush=True)


# --- faults

def container(trial, name):
    return trial.cluster.places[name].container


def kill(name):
    return lambda trial: docker("kill", container(trial, name))


def kill_all(trial):
    docker("kill", *(container(trial, name) for name in ("coordinator", *(f"worker-{rank}" for rank in range(WORKERS)))))


def pause(name, seconds):
    def fault(trial):
        paused = container(trial, name)
        docker("pause", paused)
        time.sleep(seconds)
        docker("unpause", paused)
    return fault


def disconnect(name, seconds):
    def fault(trial):
        cut = container(trial, name)
        docker("network", "disconnect", NETWORK, cut)
        time.sleep(seconds)
        # It may have ended meanwhile, as it should where it finds itself alone.
        docker("network", "connect", "--alias", name, NETWORK, cut, check=False)
    return fault


def stop(*names):
    def fault(trial):
        places = [trial.cluster.places[name] for name in names]
        known = [len(place.codes) for place in places]
        began = time.monotonic()
        docker("stop", "--time", str(GRACE), *(place.container for place in places), timeout=GRACE + 60)
        took = time.monotonic() - began
        trial.cluster.wait("their exit codes", lambda: all(len(p.codes) > n for p, n in zip(places, known)))
        codes = [place.codes[n] for place, n in zip(places, known)]
        if took >= GRACE or any(code != PREEMPTED for code in codes):
            raise Failed(f"SIGTERM to {names}: exit codes {codes} after {took:.1f} s")
        say(f"SIGTERM to {', '.join(names)}: exit code {PREEMPTED} after {took:.1f} s")
    return fault


FAULTS = [
    ("docker kill of a worker", kill("worker-1")),
    ("docker kill of the coordinator", kill("coordinator")),
    ("docker pause of a worker for 8 s", pause("worker-2", 8)),
    ("docker pause of the coordinator for 8 s", pause("coordinator", 8)),
    ("docker pause of the S3 server for 8 s", pause("s3", 8)),
    ("a worker without network for 8 s", disconnect("worker-0", 8)),
    ("the coordinator without network for 8 s", disconnect("coordinator", 8)),
    ("SIGTERM to a worker", stop("worker-2")),
    ("docker kill of all", kill_all),
    ("SIGTERM to the coordinator", stop("coordinator")),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", required=True)
    parser.add_argument("--ella", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    # Told to end, it removes its containers first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.out, options.ella = options.out.resolve(), options.ella.resolve()
    trial = Trial(options)
    try:
        say("pictures, models, and the run of this machine")
        trial.prepare_world()
        say(f"{trial.report['local_seconds']} s for {options.steps} steps")
        trial.start_store()
        trial.job("prepare", "/work/scenes", "--resolution", "64", "--min-edge", "64", "--out", "s3://ella/data")
        trial.job("embed", "s3://ella/data", "--text", "/work/models/text", "--max-tokens", "64")
        trial.train()
        trial.compare()
        trial.report["passed"] = True
    except Failed as error:
        trial.report["failed"] = str(error)
        say(f"FAILED: {error}")
    finally:
        trial.cluster.close()
        (options.out / "report.json").write_text(json.dumps(trial.report, indent=1))
    say(f"report: {options.out / 'report.json'}; logs: {options.out / 'logs'}")
    return 0 if trial.report.get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
