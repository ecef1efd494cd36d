"""What saving the paper's connector costs in PyTorch: torch.save, and torch.distributed.checkpoint's async_save.

The same state as in ella's benchmark: weights, moving average and both of AdamW's moments, 66.8 million random float32 numbers each, one
process, into FOLDER. Prints medians: how long training is held up, how long until all is on the disk, and how much memory that takes besides
the state's own.

    python commit_peer.py FOLDER
"""

import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

PARAMETERS, ROUNDS = 66_800_000, 5
BYTES = 16 * PARAMETERS


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def torch_save(state: dict, path: Path) -> float:
    begin = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        unsynced = time.perf_counter() - begin
        os.fsync(file.fileno())
    return unsynced


def async_save(state: dict, path: Path, stager, threads: int) -> float:
    begin = time.perf_counter()
    writer = dcp.FileSystemWriter(path, thread_count=threads)
    saving = dcp.async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)
    blocked = time.perf_counter() - begin
    saving.result()
    return blocked


def measure(words: str, folder: Path, state: dict, save) -> None:
    """`save` gives how long training was held up, and returns when all is on the disk."""
    Path("/proc/self/clear_refs").write_text("5")
    before, held, whole, path = memory("VmRSS"), [], [], folder / "peer"
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        held.append(save(state, path))
        whole.append(time.perf_counter() - begin)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    copies = (memory("VmHWM") - before) / BYTES
    # The first round warms up.
    held, whole = (statistics.median(times[1:]) for times in (held, whole))
    words = words.format(held=f"{held * 1e3:.0f} ms", whole=f"{whole * 1e3:.0f} ms")
    print(f"{words}: {BYTES / whole / 1e9:.2f} GB/s, in {copies:.2f} copies", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    logging.disable()
    state = {name: torch.rand(PARAMETERS) for name in ("params", "ema", "exp_avg", "exp_avg_sq")}
    print(f"PyTorch {torch.__version__}, as many bytes, medians of {ROUNDS}:")
    measure("torch.save holds training up for {held}, with fsync for {whole}", folder, state, torch_save)
    words = "holds training up for {held}, and is synced after {whole}"
    measure(f"DCP's async_save {words}", folder, state, lambda state, path: async_save(state, path, None, 1))
    # Pinned and shared memory are for GPUs and for other processes; what helps here is that the copy's memory is kept.
    for threads in (1, 2):
        stager = DefaultStager(StagingOptions(False, False, False, False))
        name = f"DCP's async_save with a stager that is kept, {threads} file{'s' * (threads > 1)},"
        measure(f"{name} {words}", folder, state, lambda state, path: async_save(state, path, stager, threads))
        stager.close()


if __name__ == "__main__":
    main()
