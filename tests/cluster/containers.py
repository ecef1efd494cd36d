"""Containers of one Docker network, and what keeps them there: as Kubernetes' controllers do, it starts another in the place of one that ended."""

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field

DOCKER = os.environ.get("DOCKER", "docker")
DONE, PREEMPTED = 0, 3
# Exit codes that a Job does not try again: bad usage or config, and what a restart would repeat.
FATAL = (2, 4)
# As Kubernetes runs what it is told to: with nothing but what it needs.
CONFINED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "512"]


class Failed(Exception):
    """What must hold did not."""


def docker(*arguments, check=True, timeout=120):
    """Runs a docker command and gives its output."""
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise Failed(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def until(what, holds, seconds=120):
    """Waits until `holds()` gives something, and gives that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.1)
    raise Failed(f"{what}: not within {seconds} s")


@dataclass
class Place:
    """What is to run: one container after the other, until one ends with 0."""

    name: str
    image: str
    command: list
    options: list = field(default_factory=list)
    container: str = ""
    starts: int = 0
    codes: list = field(default_factory=list)
    # Nothing is started there while it is held.
    held: bool = False

    @property
    def is_done(self):
        return DONE in self.codes


class Cluster:
    """A network, the places on it, and their logs."""

    def __init__(self, network, logs, labels="ella-test-cluster"):
        self.network, self.logs, self.label = network, logs, labels
        self.places, self.error = {}, None
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.clean()
        docker("network", "create", network)
        self.keeper = threading.Thread(target=self._keep, daemon=True)
        self.keeper.start()

    def clean(self):
        """Removes what an earlier one has left."""
        left = docker("ps", "--all", "--quiet", "--filter", f"label={self.label}").split()
        if left:
            docker("rm", "--force", "--volumes", *left)
        docker("network", "rm", self.network, check=False)

    def close(self):
        """Ends everything."""
        self.over.set()
        self.keeper.join(60)
        for place in list(self.places.values()):
            self._keep_log(place)
        self.clean()

    def add(self, name, image, command, options=()):
        """Starts a container in a new place."""
        place = Place(name, image, list(command), list(options))
        with self.lock:
            self.places[name] = place
            self._start(place)
        return place

    def drop(self, *names):
        """Gives places up, once their containers have ended or by ending them."""
        with self.lock:
            for name in names:
                place = self.places.pop(name)
                self._keep_log(place)
                docker("rm", "--force", "--volumes", place.container)

    def _start(self, place):
        place.starts += 1
        container = f"{self.network}-{place.name}-{place.starts}"
        docker("run", "--detach", "--name", container, "--hostname", place.name, "--network", self.network, "--network-alias", place.name,
               "--label", self.label, "--stop-timeout", "60", *CONFINED, *place.options, place.image, *place.command)
        place.container = container

    def _keep_log(self, place):
        if place.container:
            done = subprocess.run([DOCKER, "logs", place.container], capture_output=True, text=True)
            (self.logs / f"{place.container}.log").write_text(done.stdout + done.stderr)

    def _keep(self):
        while not self.over.wait(0.3):
            try:
                with self.lock:
                    for place in self.places.values():
                        self._look(place)
            except Exception as error:  # told by `check`, which every wait calls
                self.error = error
                return

    def _look(self, place):
        if place.held or place.is_done or not place.container:
            return
        state = json.loads(docker("inspect", "--format", "{{json .State}}", place.container))
        if state["Status"] != "exited":
            return
        place.codes.append(state["ExitCode"])
        self._keep_log(place)
        if state["ExitCode"] in FATAL:
            raise Failed(f"{place.container} ended with exit code {state['ExitCode']}: see its log in {self.logs}")
        if not place.is_done:
            docker("rm", "--volumes", place.container)
            self._start(place)

    def check(self):
        """Raises what went wrong in the background."""
        if self.error:
            raise self.error

    def wait(self, what, holds, seconds=120):
        """As `until`, and ends early on an error."""
        def looked():
            self.check()
            return holds()
        return until(what, looked, seconds)

    def all_done(self, names, seconds):
        """Waits until a container has ended with 0 in each place."""
        self.wait(f"the end of {', '.join(names)}", lambda: all(self.places[name].is_done for name in names), seconds)
