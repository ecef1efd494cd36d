"""What a death costs under torchrun: four processes that train 66.8 million parameters with AdamW by DDP (gloo), of which one is killed.

torchrun ends them all, starts four anew, and they go on from the last snapshot (one every SNAPSHOT steps, as its tutorial has it). Prints the
time from SIGKILL to the next applied step, less that step, and how many steps were done again.

    python recovery_peer.py            # starts torchrun itself
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKERS, KILLS, SNAPSHOT = 4, 3, 5
PARAMETERS = 66_800_000


def worker(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # One matrix of as many parameters; its product with a vector costs next to nothing.
    side = int(PARAMETERS**0.5)
    model = DistributedDataParallel(torch.nn.Linear(side, side, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    snapshot = folder / "snapshot.pt"
    step = 0
    if snapshot.exists():
        state = torch.load(snapshot)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    log = (folder / f"rank-{rank}.jsonl").open("a", buffering=1)
    while not (folder / "stop").exists():
        begin = time.time()
        loss = model(torch.ones(1, side)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.write(json.dumps({"step": step, "at": time.time(), "took": time.time() - begin, "pid": os.getpid()}) + "\n")
        if step % SNAPSHOT == 0 and rank == 0:
            half = folder / "snapshot.tmp"
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, half)
            half.rename(snapshot)
    dist.destroy_process_group()


def lines(folder: Path, rank: int) -> list[dict]:
    file = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def wait_for(what: str, holds, patience: float = 180.0):
    until = time.time() + patience
    while time.time() < until:
        found = holds()
        if found:
            return found
        time.sleep(0.05)
    raise SystemExit(f"{what}: not within {patience:.0f} s")


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    # Its shared store loses restarts otherwise.
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PEER_FOLDER": str(folder)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={WORKERS}", f"--max-restarts={KILLS + 1}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", __file__]
    agent = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waits, again = [], []
    try:
        wait_for("the first steps", lambda: len(lines(folder, 0)) > SNAPSHOT + 2)
        for kill in range(KILLS):
            victim = lines(folder, 1 + kill % (WORKERS - 1))[-1]["pid"]
            before = lines(folder, 0)
            killed = time.time()
            os.kill(victim, signal.SIGKILL)
            known = {line["pid"] for line in before}
            after = wait_for("a step after a kill", lambda: [line for line in lines(folder, 0) if line["pid"] not in known][:1])
            last = [line for line in lines(folder, 0) if line["pid"] == before[-1]["pid"]][-1]
            waits.append(after[0]["at"] - killed - after[0]["took"])
            again.append(last["step"] - after[0]["step"] + 1)
            wait_for("more steps", lambda: len(lines(folder, 0)) > len(before) + SNAPSHOT + 3)
    finally:
        (folder / "stop").touch()
        try:
            agent.wait(20)
        except subprocess.TimeoutExpired:
            agent.kill()
    waits.sort()
    took = sorted(line["took"] for line in lines(folder, 0))
    print(f"torchrun: a step of {WORKERS} processes: median {1000 * took[len(took) // 2]:.0f} ms")
    print(f"torchrun: {KILLS} kills; from SIGKILL to the next applied step, less that step: median {waits[len(waits) // 2]:.1f} s, "
          f"worst {waits[-1]:.1f} s; steps done again {again}")


if __name__ == "__main__":
    if "PEER_FOLDER" in os.environ:
        worker(Path(os.environ["PEER_FOLDER"]))
    else:
        main()
