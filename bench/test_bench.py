"""Of what bench/gpu.sh and bench/draw.py make of results. `python3 -m unittest discover -s bench`; no GPU, no torch."""

import contextlib
import io
import json
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
            run.part = lambda name, kind, command, env=None: part(run, name, command, env)
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
        self.assertEqual(tried[:3], [("train 32", "all"), ("train 32", "-pixels"), ("with all 32", "norm,conv,resize,gate,attention,cross")])
        self.assertEqual(dict(tried)["without norm 32"], "-norm,-pixels")
        self.assertEqual(dict(tried)["without pixels 32"], "-pixels")
        self.assertEqual((result["left_out"], result["train"]["32"]["images_per_second"]), (["-pixels"], 1.0))
        self.assertIn("because they break the GPU: pixels", gpu_parts.table(result))

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
