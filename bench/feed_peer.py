"""Peers of ella's feed: shuffled latents and T5-XL-shaped features from local disk, by MosaicML Streaming or litdata.

    python feed_peer.py write streaming|litdata FOLDER SAMPLES
    python feed_peer.py serve streaming|litdata FOLDER BATCH

`serve` answers each line on its standard input with a line of JSON: `epoch` reads all samples once, shuffled, in batches;
`samples` reads them without making batches; `resume FRACTION` goes on in the middle of an epoch and reads one batch.
Each sample is what ella stores: 8 x 64 x 64 and 128 x 2048 numbers in float16, 576 KiB, and a key.

Needs `pip install mosaicml-streaming litdata`. The benchmark `bench_feed` starts it.
"""

import json
import resource
import sys
import time

import numpy as np

LATENTS = (8, 64, 64)
FEATURES = (128, 2048)


def sample(index):
    rng = np.random.default_rng(index)
    return {
        "key": f"{index:09}",
        "latents": rng.integers(0, 1 << 14, LATENTS, dtype=np.uint16).view(np.float16),
        "features": rng.integers(0, 1 << 14, FEATURES, dtype=np.uint16).view(np.float16),
    }


class Streaming:
    def __init__(self, folder, batch):
        self.folder, self.batch = folder, batch

    @staticmethod
    def write(folder, samples):
        from streaming import MDSWriter

        shape = lambda dims: "ndarray:float16:" + ",".join(map(str, dims))
        columns = {"key": "str", "latents": shape(LATENTS), "features": shape(FEATURES)}
        with MDSWriter(out=folder, columns=columns) as out:
            for index in range(samples):
                out.write(sample(index))

    def dataset(self):
        from streaming import StreamingDataset

        return StreamingDataset(local=self.folder, shuffle=True, batch_size=self.batch)

    def loader(self, dataset):
        from streaming import StreamingDataLoader

        return StreamingDataLoader(dataset, batch_size=self.batch, num_workers=0)

    def resumed(self, fraction):
        first = self.loader(self.dataset())
        state = first.dataset.state_dict(int(first.dataset.size * fraction) // self.batch * self.batch, False)

        def resume():
            loader = self.loader(self.dataset())
            loader.load_state_dict(state)
            return iter(loader)

        return resume


class LitData:
    def __init__(self, folder, batch):
        self.folder, self.batch = folder, batch

    @staticmethod
    def write(folder, samples):
        from litdata import optimize

        optimize(fn=sample, inputs=list(range(samples)), output_dir=folder, chunk_bytes="64MB", num_workers=1)

    def dataset(self):
        from litdata import StreamingDataset

        return StreamingDataset(self.folder, shuffle=True)

    def loader(self, dataset):
        from litdata import StreamingDataLoader

        return StreamingDataLoader(dataset, batch_size=self.batch, num_workers=0)

    def resumed(self, fraction):
        loader = self.loader(self.dataset())
        batches = iter(loader)
        for _ in range(int(len(loader) * fraction)):
            next(batches)
        state = loader.state_dict()

        def resume():
            loader = self.loader(self.dataset())
            loader.load_state_dict(state)
            return iter(loader)

        return resume


PEERS = {"streaming": Streaming, "litdata": LitData}


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)


def rows_of(batch):
    return len(batch["key"])


def timed(read):
    wall, cpu = time.perf_counter(), cpu_seconds()
    samples = read()
    return {"samples": samples, "wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def serve(peer, answers):
    loader = peer.loader(peer.dataset())
    alone = peer.dataset()
    resumes = {}
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "epoch":
            answer = timed(lambda: sum(rows_of(batch) for batch in loader))
        elif command == "samples":
            answer = timed(lambda: sum(1 for _ in alone))
        else:
            fraction = float(arguments[0])
            if fraction not in resumes:
                resumes[fraction] = peer.resumed(fraction)
            answer = timed(lambda: rows_of(next(resumes[fraction]())))
        print(json.dumps(answer), file=answers, flush=True)


def main():
    command, kind, folder, number = sys.argv[1:]
    if command == "write":
        PEERS[kind].write(folder, int(number))
    else:
        # Whatever the libraries print must not be taken for an answer.
        answers, sys.stdout = sys.stdout, sys.stderr
        serve(PEERS[kind](folder, int(number)), answers)


if __name__ == "__main__":
    main()
