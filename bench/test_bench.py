"""Of what bench/gpu.sh and bench/draw.py make of results. `python3 -m unittest discover -s bench`; no GPU, no torch."""

import contextlib
import io
import json
import lzma
import pathlib
import sys
import tempfile
import time
import unittest
import unittest.mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import draw
import gpu_parts


def result():
    own = {"images_per_second": 210.0, "share_of_peak": 0.45, "tflops": 355.0, "memory": {"peak_reserved_bytes": 2**34}, "timed": ["ours it is"]}
    own["said_of_fused"] = ["the fused operator `gate` is off"]
    rates = {"default": 140.0, "reduce-overhead": 150.0, "max-autotune-no-cudagraphs": 145.0, "eager": 105.0}
    peer = {mode: {"images_per_second": rate} for mode, rate in rates.items()}
    return {
        "schema": 1, "date": "2027-01-02T03:04:05+00:00", "commit": "a" * 40, "preset": "sd15", "gpus": [{"name": "NVIDIA H200"}], "cpu": "x",
        "cores": 16, "versions": {"libtorch": "2.11.0"}, "train": {"32": own, "128": {"skipped": "it does not fit"}}, "peer": {"32": peer, "16": {}},
        "check": {}, "skipped": [{"part": "embed", "reason": "no time"}], "seconds": {}, "with": {"all": own}, "exact": own | {"micro_batch": 32}, "exact_without_pixels": own, "without": {"norm": {}},
        "attention": {"attentions": [
            {"pixels": 4096, "keys": 64, "heads": 8, "width": 40, "libtorch": {"both_ms": 0.9}, "own": {"both_ms": 0.3}, "libtorch_over_own": 3.0},
            {"pixels": 64, "keys": 64, "heads": 8, "width": 160, "libtorch": {"both_ms": 0.1}, "own": None, "libtorch_over_own": None},
        ]},
    }


class Parts(unittest.TestCase):
    def test_ratios_are_to_the_fastest_compiled_peer(self):
        rows = gpu_parts.summary(result())
        self.assertEqual([row["micro_batch"] for row in rows], [16, 32, 128])
        self.assertEqual((rows[1]["compiled"], rows[1]["over_compiled"], rows[1]["over_eager"]), (150.0, 1.4, 2.0))
        self.assertEqual((rows[0]["ella"], rows[2]["ella"], rows[2]["over_eager"]), (None, None, None))

    def test_the_table_has_what_is_missing(self):
        text = gpu_parts.table(result() | {"summary": gpu_parts.summary(result())})
        self.assertIn("| 32 | 210.0 | 150.0 | 105.0 | 1.40 | 2.00 | 355.0 | 45.0 % | 16.0 GiB |", text)
        self.assertIn("| 128 | – | – |", text)
        self.assertIn("With, images/s: all 210.0", text)
        self.assertIn("In exact reduction, at 32: 210.0 images/s; without pixels 210.0", text)
        self.assertIn("When it was loaded: ours it is", text)
        self.assertIn("When it was loaded: the fused operator `gate` is off", text)
        self.assertIn("| 4096 pixels | 64 keys | 8 × 40 | 0.900 | 0.300 | 3.00 |", text)
        self.assertIn("| 64 pixels | 64 keys | 8 × 160 | 0.100 | – | – |", text)
        self.assertIn("skipped: embed: no time", text)

    def test_the_fused_step_is_compared_with_libtorchs_operators(self):
        plain = {"first_loss": 1.0, "first_gradient": [0.02, 0.04], "micro_batch": 32}
        table = lambda **steps: gpu_parts.table(result() | {"summary": [], "without": {"all": plain}, "exact": None, "train": {"32": plain | steps}})
        said = "\ntrain 32 is off libtorch's operators by: first loss 1.0e-03, gradient 2.5e-02\n"
        self.assertIn(said, table(first_loss=1.001, first_gradient=[0.02, 0.041]))
        for wrong in ({"first_loss": 0.98}, {"first_gradient": [0.03, 0.04]}, {"first_gradient": [None, 0.04]}):
            self.assertIn("WRONG: train 32 is off", table(**wrong))
        self.assertIn("\ntrain 32 is off libtorch's operators by: first loss 0.0e+00\n", table(micro_batch=64))
        # Other micro-batches have other samples.
        self.assertNotIn("WRONG", table(micro_batch=64, first_loss=1.02))
        self.assertIn("WRONG: train 32 is off", table(micro_batch=64, first_loss=1.2))
        self.assertEqual(gpu_parts.off(result()), {})

    def test_a_program_that_fails_says_why(self):
        self.assertEqual(gpu_parts.read((1, "", "first\nlast line\n\n"), 5), (None, "last line"))
        self.assertEqual(gpu_parts.read(("late", "", ""), 5)[1], "it took longer than the 5 s that it had")
        self.assertEqual(gpu_parts.read((0, "words", ""), 5), (None, "it printed no JSON object"))
        self.assertEqual(gpu_parts.read((0, 'words\n{"a": 1}\n', ""), 5), ({"a": 1}, ""))

    def test_a_program_ends_with_its_time_and_its_helpers_with_it(self):
        begin = time.monotonic()
        code, out, _ = gpu_parts.finished(["sh", "-c", "echo begun; sleep 60 & sleep 60"], None, 0.5, io.StringIO())
        self.assertEqual((code, out), ("late", "begun\n"))
        self.assertLess(time.monotonic() - begin, 20)
        self.assertEqual(gpu_parts.read(gpu_parts.finished(["/no/such/program"], None, 1, io.StringIO()), 1)[0], None)


    def test_of_tests_is_told_which_failed_and_why(self):
        told = "test a ... ok\ntest b ... FAILED\nthread 'b' panicked at x.rs:1:\nkernel x: no\nnote: more\ntest result: FAILED. 1 passed\n"
        kept = ["test b ... FAILED", "thread 'b' panicked at x.rs:1:", "kernel x: no", "test result: FAILED. 1 passed"]
        self.assertEqual(gpu_parts.of_tests(told), kept)

    def test_what_is_no_text_stops_nothing(self):
        code, out, _ = gpu_parts.finished(["printf", "a\\377b"], None, 5, io.StringIO())
        self.assertEqual((code, out), (0, "a\ufffdb"))


class Order(unittest.TestCase):
    def ran(self, part, gpus, *options):
        """The result of all parts, of which `part` makes what programs would."""
        with tempfile.TemporaryDirectory() as folder:
            given = ["gpu_parts.py", "--out", folder, "--binary", "bench_gpu", "--libtorch", folder, "--libraries", "", *options]
            with unittest.mock.patch.object(sys, "argv", given):
                run = gpu_parts.Run(gpu_parts.arguments())
            run.result["gpus"] = gpus
            run.part = lambda name, kind, command, env=None, least=0: part(run, name, command, env)
            with contextlib.redirect_stderr(io.StringIO()), run.log:
                run.all()
            return json.loads((pathlib.Path(folder) / "result.json").read_text())

    def commands(self, gpus, *options):
        """The commands of all parts, none of which is run."""
        commands = []
        self.ran(lambda run, name, command, env: commands.append(command), gpus, *options)
        return commands

    def test_an_operator_that_breaks_the_gpu_is_left_out_of_what_follows(self):
        tried = []

        def part(run, name, command, env):
            fused = env.get("ELLA_FUSED", "all")
            tried.append((name, fused))
            if fused == "all" or "pixels" in fused.replace("-pixels", ""):
                run.told = "Error: while the fused operator `pixels` (ELLA_FUSED=-pixels leaves it out) was tried: CUDA error: x\n"
                return run.skip(name, "it broke")
            return {"images_per_second": 1.0, "micro_batch": 32}

        result = self.ran(part, [{"name": "G"}], "--only", "train,without", "--micro-batch", "32")
        self.assertEqual(tried[:3], [("train 32", "all"), ("train 32", "-pixels"), ("without all 32", "none")])
        self.assertEqual(dict(tried)["with all 32"], "norm,conv,resize,gate,attention,cross,update")
        self.assertEqual(dict(tried)["without norm 32"], "-norm,-pixels")
        self.assertEqual(dict(tried)["without pixels 32"], "-pixels")
        self.assertEqual((result["left_out"], result["train"]["32"]["images_per_second"]), (["-pixels"], 1.0))
        self.assertIn("because they break the GPU: pixels", gpu_parts.table(result))

    def suspected(self, *goes):
        """What was tried of steps that break the GPU without a name, unless one of `goes` is what is left out at that micro-batch, and the result."""
        tried = []

        def part(run, name, command, env):
            left_out, batch = env.get("ELLA_FUSED", ""), command[command.index("--micro-batch") + 1]
            tried.append((name, left_out))
            run.told, run.broke = "", (batch, left_out) not in goes
            return run.skip(name, "it broke") if run.broke else {"images_per_second": 1.0, "micro_batch": int(batch)}

        with unittest.mock.patch.multiple(gpu_parts, WITHOUT={"pixels": {"ELLA_FUSED": "-pixels"}}, WITH={}):
            return tried, self.ran(part, [{"name": "G"}], "--only", "train", "--micro-batch", "32,64")

    def test_a_step_that_breaks_the_gpu_without_a_name_goes_without_the_newest_kernels(self):
        tried, result = self.suspected(("32", "-pixels,-cross"), ("64", "-pixels,-cross"))
        self.assertEqual(tried[:4], [("train 32", ""), ("train 32", "-pixels"), ("train 32", "-pixels,-cross"), ("train 64", "-pixels,-cross")])
        self.assertEqual((result["left_out"], [*map(bool, result["train"].values())]), (["-pixels", "-cross"], [True, True]))
        # At one micro-batch only: the others keep them.
        tried, result = self.suspected(("32", ""), ("64", "-pixels"))
        self.assertEqual(tried[:4], [("train 32", ""), ("train 64", ""), ("train 64", "-pixels"), ("train exact 32", "")])
        self.assertEqual((result["left_out"], result["train"]["64"]["images_per_second"]), ([], 1.0))
        # It is none of them: nobody guesses again.
        tried, result = self.suspected()
        self.assertEqual([left_out for _, left_out in tried[:5]], ["", "-pixels", "-pixels,-cross", "", ""])
        self.assertEqual(result["left_out"], [])

    def test_what_broke_or_hung_is_told_from_what_failed_or_had_no_time(self):
        run = unittest.mock.Mock(result={"seconds": {}}, args=unittest.mock.Mock(minutes=1), skip=lambda *_: None, begin=0)
        for code, told, left, broke in [
            (1, "Error: CUDA error: an illegal memory access", 500, True), (1, "kernel norm_sums_bf16: misaligned address", 500, True),
            (1, "Error: step 1 has loss NaN: nothing is measured", 500, True), (-6, "", 500, True), ("late", "", 500, True), ("late", "", 40, False),
            (1, "Error: no file", 500, False), (None, "no such program", 500, False),
        ]:
            run.left = lambda: left
            with unittest.mock.patch.object(gpu_parts, "finished", return_value=(code, "", told)):
                gpu_parts.Run.part(run, "train 32", "train", [])
            self.assertEqual(run.broke, broke, (code, told, left))

    # What each part took on an H200 (bench/results/2026-11-27-h200.json), or is reckoned to take; of others, ten.
    TOOK = {
        "cuda_fused": 20, "cuda_gpu": 4, "check": 32, "attention": 18, "train": 18, "train 32": 29, "train exact": 11, "without all": 13, "embed": 10,
        "inline": 27, "peer eager": 40, "peer default": 153, "peer reduce-overhead": 153, "nccl_loaded": 5,
    }

    def told(self, minutes, **took):
        """The result of all parts by a clock of their own, the names of those that were begun, and the second at which the last one ended."""
        found = {"images_per_second": 1.0, "micro_batch": 32, "first_loss": 1.0, "ok": True} | {"same": {}, "nccl": {}, "tried": 1, "failed": 0}
        clock, begun, took = [0.0], [], self.TOOK | {name.replace("_", " "): seconds for name, seconds in took.items()}

        def finished(command, env, seconds, log):
            program = pathlib.Path(command[0]).name
            # Of parts the longest of the names that it begins with.
            own = took[program if program in took else max((part for part in took if name[0].startswith(part)), key=len, default="embed")]
            clock[0] += min(own, seconds)
            return (0, json.dumps(found), "") if own <= seconds else ("late", "", "")

        name, said = [""], gpu_parts.Run.say

        def say(run, text):
            if " s are left)" in text:
                name[0] = text.split(" (")[0]
                begun.append(name[0])
            said(run, text)

        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for program in ("cuda_fused", "cuda_gpu", "nccl_loaded"):
                (pathlib.Path(folder) / f"{program}.xz").write_bytes(lzma.compress(b""))
            given = ["gpu_parts.py", "--out", folder, "--binary", "bench_gpu", "--libtorch", folder, "--libraries", "", "--minutes", str(minutes)]
            stack.enter_context(unittest.mock.patch.multiple(gpu_parts, HERE=pathlib.Path(folder), finished=finished, gpus=lambda: [{"name": "G"}]))
            stack.enter_context(unittest.mock.patch.object(gpu_parts.time, "monotonic", lambda: clock[0]))
            stack.enter_context(unittest.mock.patch.object(gpu_parts.Run, "say", say))
            stack.enter_context(unittest.mock.patch.object(sys, "argv", given))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            run = gpu_parts.Run(gpu_parts.arguments())
            # Only what was written counts: a run may end at any time.
            with run.log:
                run.all()
            self.assertFalse([skipped for skipped in run.result["skipped"] if "Error: " in skipped["reason"]])
            return json.loads((run.at / "result.json").read_text()), begun, clock[0]

    def test_in_nine_and_a_half_minutes_the_peer_has_graphs_too(self):
        result, begun, seconds = self.told(9.5)
        self.assertEqual([*result["peer"]["32"]], ["eager", "default", "reduce-overhead"])
        self.assertEqual([*result["tests"]], ["cuda_fused", "cuda_gpu", "nccl_loaded"])
        self.assertEqual({"32", "64", "128", "16"}, {*result["train"]})
        self.assertTrue(all(result[part] for part in ("check", "attention", "profile", "exact", "embed")) and "all" in result["without"])
        self.assertLessEqual(seconds, 570)
        # What compiling took once, it takes again: what would not end is not begun.
        self.assertFalse({"peer default 64", "peer max-autotune-no-cudagraphs 64"} & {*begun})
        self.assertEqual({"cuda_fused", "train 32", "peer default 32"} - {*result["seconds"]}, set())

    def test_whenever_the_minutes_end_what_was_measured_is_there(self):
        whole = self.told(60)[1]
        self.assertEqual(whole[-1], "peer eager 16")
        for minutes in (0.5, 1, 2, 4, 6, 8):
            result, begun, seconds = self.told(minutes)
            self.assertLessEqual(seconds, 60 * minutes)
            measured = [name for name in begun if name not in {skipped["part"] for skipped in result["skipped"]}]
            self.assertEqual({*measured} - {*result["seconds"]}, set())
            self.assertEqual(sum(map(bool, result["train"].values())), sum(name.split()[0] == "train" and name[6:].isdigit() for name in measured))
            self.assertTrue(any(skipped["part"] == "peer reduce-overhead 32" for skipped in result["skipped"]))
        # A compilation that takes much longer leaves the rest its time.
        result, begun, _ = self.told(9.5, peer_default=239)
        self.assertNotIn("peer reduce-overhead 32", begun)
        self.assertTrue(result["inline"] and set(gpu_parts.WITHOUT) <= {*result["without"]})

    def test_what_a_part_stumbles_over_leaves_the_others(self):
        def part(run, name, command, env):
            if name == "train 32":
                raise OSError("no space left")
            return {"images_per_second": 1.0, "micro_batch": 32}

        result = self.ran(part, [{"name": "G"}], "--only", "train", "--micro-batch", "32,16")
        self.assertEqual([*result["train"]], ["16"])
        self.assertEqual(result["skipped"], [{"part": "train", "reason": "OSError: no space left"}])

    def test_where_there_is_no_gpu_it_says_so_at_once(self):
        with tempfile.TemporaryDirectory() as folder:
            given = ["gpu_parts.py", "--out", folder, "--binary", "/no/bench_gpu", "--libtorch", folder, "--libraries", ""]
            nothing = unittest.mock.patch.object(gpu_parts, "gpus", list), unittest.mock.patch("os.path.exists", return_value=False)
            with unittest.mock.patch.object(sys, "argv", given), nothing[0], nothing[1], self.assertRaises(SystemExit) as ended:
                gpu_parts.main()
        self.assertIn("no NVIDIA GPU here", str(ended.exception))

    def test_the_peer_has_graphs_too_where_minutes_are_left(self):
        mode = lambda command: (command[command.index("--micro-batch") + 1], command[command.index("--compile") + 1] if "--compile" in command else "eager")
        peers = [mode(command) for command in self.commands([{"name": "G"}], "--only", "peer")]
        self.assertEqual(peers[:3], [("32", "eager"), ("32", "default"), ("32", "reduce-overhead")])
        self.assertEqual(peers.count(("32", "reduce-overhead")), 1)

    def test_ella_and_the_peer_compute_in_the_same_place(self):
        device = lambda command: command[command.index("--device") + 1]
        for gpus, options, expected in (([{"name": "G"}], [], "cuda"), ([], [], "auto"), ([{"name": "G"}], ["--device", "cpu"], "cpu")):
            commands = self.commands(gpus, *options)
            self.assertTrue(any("peer_trainer" in command[1] for command in commands) and any(command[0] == "bench_gpu" for command in commands))
            self.assertEqual({device(command) for command in commands}, {expected})


class Page(unittest.TestCase):
    def drawn(self, *results):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for number, each in enumerate(results):
                (folder / f"{number}.json").write_text(json.dumps(each))
            runs = draw.results(folder)
            return draw.page(runs), draw.svg(runs)

    def test_no_results_are_said_to_be_none(self):
        self.assertIn("There are none yet", self.drawn()[0])

    def test_runs_are_drawn_in_the_order_of_their_dates(self):
        first = result() | {"summary": gpu_parts.summary(result())}
        page, svg = self.drawn(first | {"date": "2027-02-01T00:00:00+00:00"}, first)
        self.assertLess(page.index("2027-02-01"), page.index("2027-01-02"))
        self.assertLess(svg.index("2027-01-02"), svg.index("2027-02-01"))
        self.assertEqual(svg.count("<polyline"), len(draw.PANELS))

    def test_what_is_no_result_of_a_gpu_is_refused(self):
        for change, said in (({"schema": 2}, "schema 2"), ({"gpus": []}, "not measured on a GPU"), ({"date": 3}, "`date`")):
            with self.assertRaises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()):
                self.drawn(result() | {"summary": []} | change)
            self.assertIn(said, str(ended.exception))


if __name__ == "__main__":
    unittest.main()
