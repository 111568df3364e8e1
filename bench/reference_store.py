"""The other formats' side of storage_bench: npz (a file a chunk), Parquet, MosaicML's MDS.

usage: reference_store.py FLAT_FOLDER OUT_FOLDER WIDE CHUNK
Reads the spans from bench/flat_traces.h's files, prints "ready" and the formats that are
installed, then answers each line with seconds (and bytes): `write FORMAT all|ids`,
`scan FORMAT`, `random FORMAT N`. Writes end synced; a read gives numpy arrays of each plane.
"""
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

PLANES = ("tokens", "ids", "probs", "margins", "dropped")


def load_spans(folder, wide):
    places = np.fromfile(folder / "flat.idx", np.int64).reshape(-1, 3)
    data = np.fromfile(folder / "flat.bin", np.uint8)
    kinds = (np.uint16, np.uint16 if wide else np.uint8, np.uint16, np.uint16, np.uint8)
    spans = []
    for offset, tokens, layers in places:
        span = []
        for plane, kind in enumerate(kinds):
            size = np.dtype(kind).itemsize * tokens * (1 if plane == 0 else layers)
            span.append(data[offset:offset + size].view(kind))
            offset += size
        spans.append(span)
    return spans


def sync(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class Npz:
    def __init__(self, folder, chunk):
        self.folder, self.chunk = folder, chunk

    def write(self, spans, planes):
        self.count = len(spans)
        for start in range(0, len(spans), self.chunk):
            part = spans[start:start + self.chunk]
            arrays = {name: np.concatenate([s[p] for s in part]) for p, name in planes}
            arrays["tokens_each"] = np.array([len(s[0]) for s in part])
            arrays["ids_each"] = np.array([len(s[1]) for s in part])
            np.savez(self.folder / f"{start // self.chunk:05}.npz", **arrays)

    def read(self, chunk):
        with np.load(self.folder / f"{chunk:05}.npz") as file:
            return {name: file[name] for name in file.files}

    def spans(self, chunk):
        arrays = self.read(chunk)
        tokens, ids = (np.concatenate([[0], np.cumsum(arrays[k])]) for k in ("tokens_each", "ids_each"))
        for i in range(len(tokens) - 1):
            yield [arrays[name][(e := tokens if name == "tokens" else ids)[i]:e[i + 1]] for name in PLANES]

    def scan(self):
        return sum(int(span[1][0]) for c in range(-(-self.count // self.chunk)) for span in self.spans(c))

    def random(self, indices):
        total = 0
        for i in indices:
            for j, span in enumerate(self.spans(i // self.chunk)):
                if j == i % self.chunk:
                    total += int(span[1][0])
        return total


class Parquet:
    def __init__(self, folder, chunk):
        import pyarrow
        import pyarrow.parquet
        self.pa, self.pq = pyarrow, pyarrow.parquet
        self.path, self.chunk = folder / "traces.parquet", chunk

    def write(self, spans, planes):
        writer = None
        for start in range(0, len(spans), self.chunk):
            part = spans[start:start + self.chunk]
            columns = {}
            for p, name in planes:
                each = np.cumsum([0] + [len(s[p]) for s in part]).astype(np.int32)
                values = self.pa.array(np.concatenate([s[p] for s in part]))
                columns[name] = self.pa.ListArray.from_arrays(self.pa.array(each), values)
            table = self.pa.table(columns)
            writer = writer or self.pq.ParquetWriter(self.path, table.schema, compression="zstd", compression_level=1)
            writer.write_table(table, row_group_size=self.chunk)
        writer.close()

    def arrays(self, table, row):
        return [table[name][row].values.to_numpy() for name in PLANES]

    def scan(self):
        file, total = self.pq.ParquetFile(self.path), 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            total += sum(int(self.arrays(table, row)[1][0]) for row in range(table.num_rows))
        return total

    def random(self, indices):
        file, total = self.pq.ParquetFile(self.path), 0
        for i in indices:
            table = file.read_row_group(i // self.chunk, use_threads=False)
            total += int(self.arrays(table, i % self.chunk)[1][0])
        return total


class Mds:
    def __init__(self, folder, chunk):
        import streaming
        self.streaming, self.folder = streaming, folder

    def write(self, spans, planes):
        shutil.rmtree(self.folder)
        columns = {name: f"ndarray:{spans[0][p].dtype}" for p, name in planes}
        with self.streaming.MDSWriter(out=str(self.folder), columns=columns) as writer:
            for span in spans:
                writer.write({name: span[p] for p, name in planes})

    def scan(self):
        data = self.streaming.LocalDataset(str(self.folder))
        return sum(int(data[i]["ids"][0]) for i in range(len(data)))

    def random(self, indices):
        data = self.streaming.LocalDataset(str(self.folder))
        return sum(int(data[i]["ids"][0]) for i in indices)


def main(flat, out, wide, chunk):
    spans = load_spans(flat, wide)
    formats = {}
    for name, kind in (("npz", Npz), ("parquet", Parquet), ("mds", Mds)):
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
            formats[name] = kind(out / name, chunk)
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
    print("ready", *formats, flush=True)
    rng = np.random.default_rng(1)
    for line in sys.stdin:
        what, name, *rest = line.split()
        side = formats[name]
        start = time.perf_counter()
        if what == "write":
            shutil.rmtree(out / name)
            (out / name).mkdir()
            planes = list(enumerate(PLANES))[:None if rest[0] == "all" else 2]
            side.write(spans, planes)
            sync(out / name)
        elif what == "scan":
            side.scan()
        elif what == "random":
            side.random(rng.integers(0, len(spans), int(rest[0])).tolist())
        seconds = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (out / name).rglob("*") if p.is_file())
        print(seconds, size, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
