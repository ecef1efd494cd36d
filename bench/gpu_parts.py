"""What bench/gpu.sh runs, part by part, by importance, until its minutes are over. The standard library only.

After every part result.json and table.md are written anew: a run that is cut off leaves what it has measured. A part that cannot run, runs
out of its time or fails is in them with its reason, and the others go on.
"""

import argparse
import datetime
import json
import lzma
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

SCHEMA = 1
HERE = pathlib.Path(__file__).resolve().parent
MICRO_BATCHES = {"sd15": "32,64,128,16", "nano": "2,4"}
# The peer's batch that its slowest and, in the end, fastest compilation is tried on.
TUNED = 64
# Seconds: what a part may take, and what must be left for it to be begun.
CAPS = {"check": 120, "tests": 45, "train": 75, "without": 75, "embed": 60, "inline": 120, "profile": 60, "attention": 60, "peer": 240}
LEAST = {"peer": 60, "inline": 25}
PARTS = [*CAPS]
FUSED = ["norm", "conv", "resize", "gate", "attention", "cross", "pixels", "update"]
# What the step is measured without, one at a time, and how it is turned off; what is taken only where it is faster, and how it is taken all the same.
WITHOUT = {name: {"ELLA_FUSED": f"-{name}"} for name in ("pixels", "cross", "norm")} | {"graphs": {"ELLA_GRAPHS": "off"}}
WITH = {"all": {"ELLA_FUSED": "all"}}
# What ella says of an operator that breaks the GPU where it is tried.
BREAKS = re.compile(r"ELLA_FUSED=(-\w+) leaves it out")
# What a step says that an operator has broken without a name; and what is left out then, one more at a time: the newest, whose trials are small.
FAULTS = re.compile(r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|kernel \w+: |nothing is measured")
SUSPECTS = ["-pixels", "-cross"]
# How far the fused step may be from libtorch's operators alone: of the first loss, and of the first gradient, whose bits are fewer.
LOSS_OFF, GRADIENT_OFF = 0.01, 0.05


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("out", "binary", "libtorch", "libraries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--goldens", default="")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--minutes", type=float, default=9.5, help="after these it ends, whatever is left (%(default)s)")
    parser.add_argument("--preset", choices=[*MICRO_BATCHES], default="sd15", help="nano: to try it on a processor (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--micro-batch", help="of training, by importance (32,64,128,16)")
    parser.add_argument("--only", help=f"these parts alone, of {', '.join(PARTS)}")
    args = parser.parse_args()
    if not 0 < args.minutes < 24 * 60:
        parser.error(f"--minutes {args.minutes} is not above 0")
    try:
        args.batches = [int(text) for text in (args.micro_batch or MICRO_BATCHES[args.preset]).split(",")]
    except ValueError:
        parser.error(f"--micro-batch {args.micro_batch}: whole numbers with commas between them")
    if min(args.batches) < 1:
        parser.error("--micro-batch: at least 1")
    args.parts = args.only.split(",") if args.only else PARTS
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: not of {', '.join(PARTS)}")
    return args


def asked(*command):
    """What a program says, or nothing if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


GPU_FACTS = ["name", "uuid", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory", "mig.mode.current"]


def gpus():
    """The machine's GPUs by nvidia-smi."""
    rows = asked("nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader") or ""
    return [dict(zip(GPU_FACTS, (field.strip() for field in row.split(",")))) for row in rows.splitlines() if row]


def cpu():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(libtorch):
    """Of what is measured with; the peer's own are in its results."""
    lines = []
    for name in ("version.py", "build-version"):
        path = pathlib.Path(libtorch) / name
        if path.is_file():
            lines += path.read_text().splitlines()
    quoted = {line.split("=")[0].split(":")[0].strip(): line.rsplit("=", 1)[1].strip().strip("'\"") for line in lines if "=" in line}
    return {
        "libtorch": quoted.get("__version__") or (lines[0] if lines else None), "cuda": quoted.get("cuda"),
        "python": platform.python_version(), "glibc": "-".join(platform.libc_ver()), "kernel": platform.release(),
    }


class Run:
    def __init__(self, args):
        self.args, self.begin, self.at = args, time.monotonic(), pathlib.Path(args.out).resolve()
        self.log = open(self.at / "log", "w", buffering=1, encoding="utf-8")
        self.result = {
            "schema": SCHEMA, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": args.commit,
            "preset": args.preset, "gpus": gpus(), "cpu": cpu(), "cores": os.cpu_count(), "versions": versions(args.libtorch),
            "train": {}, "exact": None, "exact_without_pixels": None, "without": {}, "with": {}, "peer": {}, "check": {}, "tests": {},
            "left_out": [], "skipped": [], "seconds": {},
        }
        self.unpacked, self.peer_path = None, None
        # What the last part's program told on standard error, and whether it broke or hung; what may still be guessed to be the cause.
        self.told, self.broke, self.suspects = "", False, SUSPECTS

    def left(self):
        return 60 * self.args.minutes - (time.monotonic() - self.begin)

    def skip(self, part, reason):
        self.result["skipped"].append({"part": part, "reason": reason})
        self.say(f"{part}: skipped: {reason}")

    def say(self, text):
        print(text, file=sys.stderr, flush=True)
        print(text, file=self.log)

    def write(self):
        """Replaces both files; a reader never sees half of one. What is measured comes first."""
        self.result["summary"] = summary(self.result)
        for name, text in (("result.json", lambda: json.dumps(self.result, indent=1) + "\n"), ("table.md", lambda: table(self.result))):
            part = self.at / f".{name}"
            part.write_text(text(), encoding="utf-8")
            part.replace(self.at / name)

    def part(self, name, kind, command, env=None, least=0):
        """The JSON object of a part's program, or None with the reason told. With fewer seconds than `least` left, it is not begun."""
        seconds, self.told, self.broke = min(CAPS[kind], self.left()), "", False
        if seconds < max(least, LEAST.get(kind, 10)):
            return self.skip(name, f"of the {self.args.minutes:g} minutes too little is left")
        self.say(f"{name} ({self.left():.0f} s are left)")
        begin = time.monotonic()
        done = finished(command, os.environ | (env or {}), seconds, self.log)
        self.told = done[2]
        self.broke = seconds == CAPS[kind] if done[0] == "late" else (done[0] or 0) < 0 or bool(FAULTS.search(self.told))
        self.result["seconds"][name] = round(time.monotonic() - begin, 1)
        found, reason = read(done, seconds)
        if found is None or "skipped" in found:
            self.skip(name, found["skipped"] if found else reason)
        if found is not None:
            self.say(f"  {brief(found)}")
        return found

    def device(self):
        """Where ella and the peer compute. A GPU that is there and does not start is an error, not a reason to measure the processor."""
        return "cuda" if self.args.device == "auto" and self.result["gpus"] else self.args.device

    def ella(self, name, kind, *options, env=None):
        args = self.args
        command = [args.binary, kind, "--json", "--preset", args.preset, "--device", self.device(), "--threads", str(os.cpu_count()), *options]
        tried = lambda: self.part(name, kind, command, {"LD_LIBRARY_PATH": args.libraries} | self.without_broken(env or {}))
        found = tried()
        # The others can be measured all the same.
        while found is None and self.breaks(self.told):
            found = tried()
        guessed = found is None and kind == "train" and (env or {}).get("ELLA_FUSED") != "none"
        return self.without_suspects(tried) if guessed else found

    def without_suspects(self, tried):
        """What a step gives without what may have broken it or hung, from here on left out of everything, unless another step went with it."""
        known, went = list(self.result["left_out"]), any(map(rate, self.result["train"].values()))
        for name in self.suspects:
            if not self.broke:
                break
            if name in known:
                continue
            self.result["left_out"].append(name)
            if found := tried():
                self.result["left_out"] = known if went else self.result["left_out"]
                return found
        self.result["left_out"] = known
        # Where it is none of them, nobody guesses again.
        self.suspects = [] if self.broke else self.suspects
        return None

    def breaks(self, told):
        """Whether a program tells of an operator that breaks the GPU, and was not left out; from here on it is."""
        broken = [name for name in BREAKS.findall(told) if name not in self.result["left_out"]]
        self.result["left_out"] += broken[:1]
        return bool(broken)

    def without_broken(self, env):
        """These settings, in which operators that break the GPU are left out."""
        wanted, out = env.get("ELLA_FUSED", os.environ.get("ELLA_FUSED")), self.result["left_out"]
        if not out:
            return env
        if not wanted or wanted.startswith("-"):
            names = dict.fromkeys([*filter(None, [wanted]), *out])
        else:
            names = [name for name in (FUSED if wanted == "all" else wanted.split(",")) if f"-{name.strip()}" not in out]
        return env | {"ELLA_FUSED": ",".join(names)}

    def tests(self, name):
        """A program of tests, which lies beside this script where bench/pack.sh has put it: the one thing to tell is whether all passed."""
        if "tests" not in self.args.parts or self.args.preset != "sd15":
            return
        packed, seconds = HERE / f"{name}.xz", min(CAPS["tests"], self.left())
        if not packed.is_file():
            return self.skip(name, f"{packed.name} is not beside the script: bench/pack.sh puts it there")
        if seconds < 10:
            return self.skip(name, f"of the {self.args.minutes:g} minutes too little is left")
        env = {"LD_LIBRARY_PATH": self.args.libraries, "NCCL_RS_TEST_DIR": f"{self.args.libtorch}/../nvidia/nccl/lib"}
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder) / name
            program.write_bytes(lzma.open(packed).read())
            program.chmod(0o755)
            given = [str(program), "--nocapture", "--test-threads=1"]
            code, out, err = finished(given, os.environ | env | self.without_broken({}), seconds, self.log)
        self.result["seconds"][name] = round(time.monotonic() - begin, 1)
        self.breaks(out + err)
        # On a machine with a GPU a test that found none has not passed.
        ok = code == 0 and not (self.result["gpus"] and "skipped" in out + err)
        self.result["tests"][name] = {"ok": ok, "code": code, "lines": of_tests(out + "\n" + err)[-20:]}
        self.say(f"{name}: {'passed' if ok else f'FAILED ({code})'}")
        self.write()

    def peer(self, batch, mode):
        """The peer at a micro-batch, compiled in one of torch.compile's modes, or "eager"."""
        if "peer" not in self.args.parts:
            return
        # A window is of about 256 images.
        steps = str(max(2, 256 // batch) if self.args.preset == "sd15" else 2)
        command = [sys.executable, str(HERE / "peer_trainer.py"), "--json", "--preset", self.args.preset, "--device", self.device()]
        command += ["--micro-batch", str(batch), "--steps", steps, "--windows", "5"]
        command += ["--eager"] if mode == "eager" else ["--compile", mode]
        path = os.pathsep.join(filter(None, [self.peer_path, os.environ.get("PYTHONPATH")]))
        # What another compilation took, this one takes too.
        least = 0 if mode == "eager" else self.result["seconds"].get(f"peer default {self.args.batches[0]}", 0)
        if found := self.part(f"peer {mode} {batch}", "peer", command, {"PYTHONPATH": path} if path else None, least):
            self.result["peer"].setdefault(str(batch), {})[mode] = found
        self.write()

    def unpack_wheels(self):
        """Puts the wheels that the peer lacks where it finds them; they go when the run ends."""
        folder = os.environ.get("PEER_WHEELS") or HERE / "wheels"
        wheels = sorted(map(str, pathlib.Path(folder).glob("*.whl")))
        if not wheels or "peer" not in self.args.parts:
            return
        self.unpacked = tempfile.TemporaryDirectory()
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(self.unpacked.name)
        self.peer_path = self.unpacked.name

    def all(self):
        """Every part, the more important first. Whatever one of them stumbles over, the others go on."""
        for work, *given in self.order():
            try:
                work(*given)
            except Exception as error:
                self.skip(work.__name__, f"{type(error).__name__}: {error}")

    def order(self):
        """What is not known of these kernels and cannot be known elsewhere comes first; of the peer, the modes at the first micro-batch.

        At the end of each line, the seconds that are over then on an H200, reckoned from bench/results/2026-11-27-h200.json, with 3 more for each of
        ella's programs, whose trials are new since, and 10 for the kernels' first compilation. There are 570.
        """
        first, *rest = self.args.batches
        yield self.unpack_wheels,
        yield self.tests, "cuda_fused"  # 20
        yield self.tests, "cuda_gpu"  # 24
        yield self.check, "fused", "all"  # 56
        yield self.once, "attention", first, 0.2  # 74
        yield self.train, first, 8  # 103
        # What the fused step is compared with.
        yield self.otherwise, "without", "all", {"ELLA_FUSED": "none"}, first, 2  # 116
        yield self.once, "profile", first  # 126
        for batch in rest:
            yield self.train, batch, 5  # 144, 162, 180
        yield self.peer, first, "eager"  # 220
        yield self.peer, first, "default"  # 373
        # CUDA graphs, which ella has too.
        yield self.peer, first, "reduce-overhead"  # 526
        yield self.exact, "exact", {}, first  # 537
        yield self.once, "embed", first  # 547
        yield self.tests, "nccl_loaded"  # 552
        yield self.once, "inline", first, 3  # 579: where something went faster than reckoned; else its time is for the next ones
        for batch in rest:
            yield self.peer, batch, "default"
        yield self.exact, "exact_without_pixels", WITHOUT["pixels"], first
        for how, settings in (("without", WITHOUT), ("with", WITH)):
            for name, env in settings.items():
                yield self.otherwise, how, name, env, first, 4
        yield self.check, "plain", "none"
        yield self.peer, TUNED if TUNED in rest else first, "max-autotune-no-cudagraphs"
        for batch in rest:
            yield self.peer, batch, "eager"

    def check(self, name, fused):
        if "check" in self.args.parts:
            goldens = ["--goldens", self.args.goldens] if self.args.goldens else []
            found = self.ella(f"check {name}", "check", *goldens, env={"ELLA_FUSED": fused})
            if found and "skipped" not in found:
                self.result["check"][name] = found
            self.write()

    def train(self, batch, seconds):
        if "train" in self.args.parts:
            found = self.ella(f"train {batch}", "train", "--micro-batch", str(batch), "--seconds", self.seconds(seconds))
            self.result["train"][str(batch)] = found
            self.write()

    def exact(self, name, env, batch):
        """The step as SAME asks for it: sums in fixed point, kernels that give the same bits each time."""
        if "train" in self.args.parts:
            options = ["--micro-batch", str(batch), "--seconds", self.seconds(4), "--reduction", "exact"]
            self.result[name] = self.ella(f"train {name} {batch}", "train", *options, env=env)
            self.write()

    def otherwise(self, how, name, env, batch, seconds):
        """What an optimisation is worth: the step without it, or with one that is off by itself."""
        if "without" in self.args.parts:
            options = ["--micro-batch", str(batch), "--seconds", self.seconds(seconds)]
            self.result[how][name] = self.ella(f"{how} {name} {batch}", "train", *options, env=env)
            self.write()

    def once(self, kind, batch, seconds=5):
        """What is measured at one micro-batch only."""
        if kind in self.args.parts:
            self.result[kind] = self.ella(kind, kind, "--micro-batch", str(batch), "--seconds", self.seconds(seconds))
            self.write()

    def seconds(self, of_a_gpu):
        return str(of_a_gpu if self.args.preset == "sd15" else 0.3)


def of_tests(told):
    """Of what a program of tests told: how it ended, which tests failed, and where and why each panicked, which stands on the line below."""
    lines = told.splitlines()
    kept = lambda i: lines[i].startswith("test result:") or "FAILED" in lines[i] or "panicked" in lines[i] or (i and "panicked" in lines[i - 1])
    return [lines[i] for i in range(len(lines)) if kept(i)]


def finished(command, env, seconds, log):
    """Runs a program with its helpers to its end, or until its time is over, and ends all of them then."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    try:
        child = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    except OSError as error:
        return None, "", str(error)
    try:
        out, err = child.communicate(timeout=seconds)
        code = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        try:
            out, err = child.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            # Something of another process group holds the pipes.
            out, err = "", ""
        code = "late"
    print(f"$ {' '.join(map(str, command))}\n{err}{out}", file=log)
    return code, out, err


def read(done, seconds):
    """(The object that a program printed, or None; why there is none)."""
    code, out, err = done
    if code == "late":
        return None, f"it took longer than the {seconds:.0f} s that it had"
    lines = [line for line in err.splitlines() if line.strip()]
    if code != 0:
        return None, lines[-1] if lines else f"it ended with {code}"
    try:
        return json.loads(out.splitlines()[-1]), ""
    except (ValueError, IndexError):
        return None, "it printed no JSON object"


def brief(found):
    """A part's result in a line."""
    names = ["ok", "failed", "recorded_lanes", "images_per_second", "captions_per_second", "tflops", "share_of_peak", "kernel_ms"]
    names += ["over_cached", "skipped"]
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    return ", ".join(f"{name} {shown(found[name])}" for name in names if found.get(name) is not None)


def rate(found):
    return found.get("images_per_second") if found else None


def summary(result):
    """By micro-batch: ella's images a second, those of the compiled peer (the fastest way measured) and of the eager one, and ella's ratio to each."""
    rows = []
    for batch in sorted({*result["train"], *result["peer"]}, key=int):
        own, peers = result["train"].get(batch), result["peer"].get(batch, {})
        compiled = max((rate(found) for mode, found in peers.items() if mode != "eager"), default=None)
        eager = rate(peers.get("eager"))
        over = lambda other: rate(own) / other if rate(own) and other else None
        of_own = own or {}
        memory = of_own.get("memory") or {}
        rows.append({
            "micro_batch": int(batch), "ella": rate(own), "compiled": compiled, "eager": eager, "over_compiled": over(compiled),
            "over_eager": over(eager), "tflops": of_own.get("tflops"), "share_of_peak": of_own.get("share_of_peak"),
            "peak_memory_bytes": memory.get("peak_reserved_bytes") or memory.get("peak_resident_bytes"),
        })
    return rows


def off(result):
    """By step: how far its first loss is from that of libtorch's operators alone, or of what else was measured without something; and at the same
    micro-batch its first gradient, by the norms of its stretches. As shares of theirs."""
    reference = next((found for found in result.get("without", {}).values() if (found or {}).get("first_loss")), {})
    steps = {f"train {batch}": found for batch, found in result["train"].items()} | {"exact": result.get("exact")}
    rows = {}
    for name, found in steps.items():
        if not reference or not (found or {}).get("first_loss"):
            continue
        apart, (norms, wanted) = None, [of.get("first_gradient") for of in (found, reference)]
        if norms and wanted and found.get("micro_batch") == reference.get("micro_batch"):
            # JSON has null for what is no number.
            apart = math.inf if None in norms + wanted else max(abs(one - other) for one, other in zip(norms, wanted)) / (max(wanted) or 1)
        rows[name] = abs(found["first_loss"] / reference["first_loss"] - 1), apart
    return rows


def number(value, form=".1f", unit=""):
    return "–" if value is None else f"{value:{form}}{unit}"


def table(result):
    """The result for people."""
    device = ", ".join(gpu["name"] for gpu in result["gpus"]) or f"no GPU; {result['cpu']}, {result['cores']} cores"
    parts = [f"# {device}\n\n{result['date']}, commit {result['commit']}, preset {result['preset']}, libtorch {result['versions']['libtorch']}\n"]
    for name, found in result["check"].items():
        if found:
            same = "yes" if found["same"].get("ok") else "NO"
            parts.append(
                f"Correctness, {name}: {found['tried'] - found['failed']} of {found['tried']} within bounds; two runs have the same bits: {same}; "
                f"NCCL in a world of one: {found['nccl'].get('ok', found['nccl'].get('skipped'))}\n"
            )
    rows = ["| micro-batch | ella, images/s | compiled peer | eager peer | ella / compiled | ella / eager | TFLOP/s | of measured peak | memory |"]
    rows.append("|---" * 9 + "|")
    for row in result["summary"]:
        share, memory = row["share_of_peak"], row["peak_memory_bytes"]
        cells = [
            str(row["micro_batch"]), *(number(row[of]) for of in ("ella", "compiled", "eager")),
            *(number(row[of], ".2f") for of in ("over_compiled", "over_eager")), number(row["tflops"]),
            number(share and 100 * share, ".1f", " %"), number(memory and memory / 2**30, ".1f", " GiB"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    parts.append("\n".join(rows) + "\n")
    parts += more(result)
    for skipped in result["skipped"]:
        parts.append(f"- skipped: {skipped['part']}: {skipped['reason']}")
    return "\n".join(parts).rstrip() + "\n"


def more(result):
    """Embedding, inline features, and the profile."""
    found, texts = result.get("embed"), []
    if exact := rate(result.get("exact")):
        without = number(rate(result.get("exact_without_pixels")))
        texts.append(f"In exact reduction, at {result['exact']['micro_batch']}: {exact:.1f} images/s; without pixels {without}\n")
    for of in ("timed", "said_of_fused"):
        said = next((found[of] for found in result["train"].values() if (found or {}).get(of)), [])
        texts += [f"When it was loaded: {line}\n" for line in said]
    for name, (loss, gradient) in off(result).items():
        # Other micro-batches have other samples.
        wrong = loss > (10 * LOSS_OFF if gradient is None else LOSS_OFF) or (gradient or 0) > GRADIENT_OFF
        shown = f"first loss {loss:.1e}" + (f", gradient {gradient:.1e}" if gradient is not None else "")
        texts.append(f"{'WRONG: ' if wrong else ''}{name} is off libtorch's operators by: {shown}\n")
    if out := result.get("left_out"):
        texts.append(f"Left out of everything, because they break the GPU: {', '.join(name.removeprefix('-') for name in out)}\n")
    for how in ("with", "without"):
        own = {name: rate(found) for name, found in result.get(how, {}).items() if rate(found)}
        if own:
            texts.append(f"{how.capitalize()}, images/s: " + ", ".join(f"{name} {value:.1f}" for name, value in own.items()) + "\n")
    for name, tests in result.get("tests", {}).items():
        texts.append(f"{name}: {'passed' if tests['ok'] else 'FAILED: ' + '; '.join(tests['lines'])}\n")
    if rate_of := (found or {}).get("tokens_per_second"):
        texts.append(f"Text encoder: {rate_of:.0f} tokens/s at {found['tokens']} a caption, {100 * found['share_of_peak']:.1f} % of the peak\n")
    if ratios := (result.get("inline") or {}).get("over_cached"):
        shown = ", ".join(f"{name.replace('_', ' ')} {number(value, '.2f')}" for name, value in ratios.items())
        texts.append(f"Inline over cached features, images/s: {shown}\n")
    if attentions := (result.get("attention") or {}).get("attentions"):
        rows = ["| attention of | to | heads | libtorch, ms | own, ms | libtorch / own |", "|---|---|---|---|---|---|"]
        for row in attentions:
            cells = [f"{row['pixels']} pixels", f"{row['keys']} keys", f"{row['heads']} × {row['width']}"]
            cells += [number((row[of] or {}).get("both_ms"), ".3f") for of in ("libtorch", "own")] + [number(row["libtorch_over_own"], ".2f")]
            rows.append(f"| {' | '.join(cells)} |")
        texts.append("\n".join(rows) + "\n")
    if families := (result.get("profile") or {}).get("families"):
        profile = result["profile"]
        rows = [f"One step at {profile['micro_batch']}: {profile['kernel_ms']:.1f} ms in kernels, {profile['idle_ms']:.1f} ms idle\n"]
        rows += ["| family | ms | share | calls |", "|---|---|---|---|"]
        rows += [f"| {row['name']} | {row['ms']:.2f} | {100 * row['share']:.1f} % | {row['calls']} |" for row in families]
        texts.append("\n".join(rows) + "\n")
    return texts


def main():
    args = arguments()
    if args.preset == "sd15" and args.device != "cpu" and not os.path.exists("/dev/nvidiactl") and not gpus():
        sys.exit("bench/gpu.sh: there is no NVIDIA GPU here (nvidia-smi lists none): --preset nano tries everything on a processor")
    run = Run(args)
    run.write()
    with tempfile.TemporaryDirectory() as cache:
        # Twenty programs need not compile the same kernels.
        os.environ.setdefault("ELLA_KERNEL_CACHE", cache)
        try:
            run.all()
        finally:
            run.write()
    print((run.at / "table.md").read_text(), end="")
    checks = [found for found in run.result["check"].values() if found]
    sys.exit(1 if any(found["ok"] is False for found in [*checks, *run.result["tests"].values()]) else 0)


if __name__ == "__main__":
    main()
