"""Tests of the demo's care for the folder that it is given: by running it with a cargo and an ella that do nothing."""

import os
import pathlib
import subprocess
import tempfile
import unittest

DEMO = pathlib.Path(__file__).parent / "demo.sh"
# What the ella of these tests ends with, as the demo does then: its folder has been made ready.
BEGUN = 7


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class Folder(unittest.TestCase):
    def setUp(self):
        there = tempfile.TemporaryDirectory()
        self.addCleanup(there.cleanup)
        self.root = pathlib.Path(there.name)
        self.out = self.root / "out"
        script(self.root / "bin/cargo", f"echo '{{\"target_directory\": \"{self.root}\"}}'")
        script(self.root / "release/ella", f"exit {BEGUN}")

    def demo(self):
        env = {**os.environ, "DEMO_DIR": str(self.out), "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run([DEMO], env=env, capture_output=True, text=True, timeout=60)

    def test_what_no_demo_has_made_is_left_as_it_is(self):
        for name in ("thesis.tex", "run.toml", ".profile"):
            self.out.mkdir()
            (self.out / name).write_text("mine")
            ran = self.demo()
            self.assertEqual((ran.returncode, (self.out / name).read_text()), (2, "mine"), ran.stderr)
            self.assertIn(f"DEMO_DIR={self.out}: not empty", ran.stderr)
            (self.out / name).unlink()
            self.out.rmdir()

    def test_a_new_an_empty_and_an_earlier_demos_folder_are_begun_anew(self):
        self.assertEqual(self.demo().returncode, BEGUN)
        # It ended before it had made anything; the next one is to find only what is its own.
        (self.out / "scenes").mkdir()
        (self.out / "scenes/0.tar").write_text("old")
        self.assertEqual(self.demo().returncode, BEGUN)
        self.assertEqual([path.name for path in self.out.iterdir()], [".ella-demo"])
        (self.out / ".ella-demo").unlink()
        self.assertEqual(self.demo().returncode, BEGUN)


if __name__ == "__main__":
    unittest.main()
