"""Tests of what an image's files are laid out from: by running the script on a libtorch of empty files, and binaries that are none of ours."""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

SCRIPT = pathlib.Path(__file__).parent / "image-root.sh"
# Each file of libtorch's, and what it is taken by.
TORCH = {
    "torch/lib/libc10.so": "torch/lib/libc10.so*",
    "torch/lib/libgomp.so.1": "torch/lib/libgomp.so*",
    "torch/lib/libtorch_cpu.so": "torch/lib/libtorch_cpu.so",
    "torch/version.py": "torch/version.py",
    "torch-2.11.0.dist-info/METADATA": "torch-*.dist-info/METADATA",
}
NEEDED = ["c++", "ldd", "strip"]
CERTIFICATES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")


@unittest.skipUnless(CERTIFICATES.exists() and all(map(shutil.which, NEEDED)), "what the script needs is not there")
class Libtorch(unittest.TestCase):
    def setUp(self):
        there = tempfile.TemporaryDirectory()
        self.addCleanup(there.cleanup)
        self.root = pathlib.Path(there.name)
        (self.root / "release").mkdir()
        for name in ("ella", "ella-worker"):
            shutil.copy("/bin/true", self.root / "release" / name)

    def lay_out(self, files):
        for name in ("wheels", "image"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name in files:
            (self.root / "wheels" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / "wheels" / name).touch()
        env = {**os.environ, "CARGO_TARGET_DIR": str(self.root), "LIBTORCH": str(self.root / "wheels/torch")}
        ran = subprocess.run([SCRIPT, "worker", self.root / "image"], env=env, capture_output=True, text=True, timeout=60)
        return ran.returncode, ran.stderr

    def test_what_the_image_needs_is_taken_or_missed_by_name(self):
        self.assertEqual(self.lay_out(TORCH), (0, ""))
        for name in TORCH:
            self.assertTrue((self.root / "image/opt/libtorch" / name).exists(), name)
        for name, pattern in TORCH.items():
            code, said = self.lay_out([other for other in TORCH if other != name])
            self.assertEqual(code, 1, name)
            self.assertRegex(said, f"^ella: .*/{re.escape(pattern)}:? ")

    def test_cudas_libraries_are_taken_where_they_are_there(self):
        cuda = ["nvidia/cu13/lib/libcudart.so.13", "nvidia_cuda_runtime-13.0.96.dist-info/METADATA"]
        self.assertEqual(self.lay_out([*TORCH, *cuda]), (0, ""))
        for name in cuda:
            self.assertTrue((self.root / "image/opt/libtorch" / name).exists(), name)


if __name__ == "__main__":
    unittest.main()
