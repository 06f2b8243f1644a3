"""A million passages: how long a search takes, how much of the exact answer it finds, and whether memory grows with the corpus.

    pip install 'wellread[retrieve]'
    WELLREAD_DATA=... python -m bench.peers.index_size [--quick]

Sentence vectors of all-MiniLM-L6-v2 (384 numbers) of real short texts, and mixtures of two of them to fill up to a million; queries are real ones that
are not in the index. The index is wellread's own, built by its own code in a process of its own; only the encoding is replaced by reading the vectors,
since it would take an hour. The peer is one FAISS HNSW graph of all vectors in memory with the same settings, as a user would write it.
--quick tries it out on a part and records nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import faiss
import numpy as np

from bench.harness import Expect, record_peer
from wellread import load, runtime
from wellread.index import BUILD_BREADTH, NEIGHBOURS, SEARCH_BREADTH, Index, encode

QUICK = "--quick" in sys.argv
SMALL, LARGE, ASKED = (3000, 12_000, 50) if QUICK else (250_000, 1_000_000, 500)
TEXTS = 300 if QUICK else 5_000  # of each source
SOURCES = ("banking77/train.csv", "stackoverflow/title_StackOverflow.txt", "sst2/train.txt")  # a text in each line
EXPECTS = [
    Expect("a search among a million vectors takes at most 20 ms", "search_ms", 20.0, at_least=False),
    Expect("and finds at least 95 % of the exact ten nearest", "recall_at_10", 0.95),
    Expect("building with four times the passages takes at most a tenth more memory", "large_build_mb / small_build_mb", 1.1, at_least=False),
    Expect("searching takes at most a tenth of the vectors' size in memory of its own", "search_private_mb / vectors_mb", 0.1, at_least=False),
    Expect("one graph in memory is not more than twice as fast", "search_ms / peer_ms", 2.0, at_least=False),
    Expect("and its recall is not more than 0.02 above", "peer_recall_at_10 - recall_at_10", 0.02, at_least=False),
]


class Given(Index):
    """An index whose passages are numbers, and whose encoder reads the vector of that number from a file."""

    def _vectors(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        return np.load(os.environ["VECTORS"], mmap_mode="r")[[int(text) for text in texts]]


def passages(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        yield {"id": str(number), "text": str(number)}


def build(folder: str, count: str) -> None:
    """In a process of its own: build, and print what it took."""
    with runtime.using(progress=False):
        encoder = load("minilm-l6")
        before, began, highest, done = private_mb(), time.perf_counter(), [0.0], Event()

        def watch() -> None:
            while not done.wait(0.05):
                highest[0] = max(highest[0], private_mb())

        watcher = Thread(target=watch)
        watcher.start()
        Given.build(encoder, passages(int(count)), folder, kind="hnsw", lexical=False).close()
        done.set()
        watcher.join()
    print(json.dumps({"mb": highest[0] - before, "seconds": time.perf_counter() - began}))


def ask(folder: str, first: str) -> None:
    """In a process of its own: search for the last vectors one at a time, and print times, hits and how much memory is not shared with files."""
    with runtime.using(progress=False):
        index = Given.open(folder)
        questions = [str(int(first) + number) for number in range(ASKED)]
        for question in questions[:20]:
            index.search(question, 10, "dense")
        before, took, hits = private_mb(), [], []
        for question in questions:
            began = time.perf_counter()
            found = index.search(question, 10, "dense")
            took.append(1000 * (time.perf_counter() - began))
            hits.append([int(hit.id) for hit in found])
    print(json.dumps({"ms": took, "hits": hits, "mb": private_mb(), "before": before}))


def private_mb() -> float:
    """Memory of this process that is not a part of a mapped file."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def process(*words: str, vectors: str) -> dict[str, Any]:
    words = (*words, "--quick") if QUICK else words
    done = subprocess.run([sys.executable, "-m", "bench.peers.index_size", *words], env=os.environ | {"VECTORS": vectors}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def real_vectors() -> np.ndarray:
    """[N, 384], of length 1, in random order."""
    encoder = load("minilm-l6")
    texts: list[str] = []
    for name in SOURCES:
        lines = (Path(os.environ["WELLREAD_DATA"]) / name).read_text("utf-8").splitlines()
        texts += [lines[row] for row in np.random.default_rng(0).permutation(len(lines))[:TEXTS]]
    found = encode(encoder, list(dict.fromkeys(texts)))
    return found[np.random.default_rng(1).permutation(len(found))]


def main() -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, random = f"{folder}/vectors.npy", np.random.default_rng(2)
        known = real_vectors()
        queries, known = known[:ASKED], known[ASKED:]
        print(f"{len(known)} real vectors, {time.perf_counter() - began:.0f} s", flush=True)
        every = np.lib.format.open_memmap(file, "w+", np.float32, (LARGE + ASKED, known.shape[1]))
        every[: len(known)] = known[:LARGE]
        for start in range(len(known), LARGE, 50_000):
            count = min(50_000, LARGE - start)
            first, second = (known[random.integers(len(known), size=count)] for _ in range(2))
            weight = random.uniform(0.5, 1, (count, 1)).astype(np.float32)
            every[start : start + count] = weight * first + (1 - weight) * second
            every[start : start + count] /= np.linalg.norm(every[start : start + count], axis=1, keepdims=True)
        every[LARGE:] = queries
        every.flush()
        small = process("--build", f"{folder}/small", str(SMALL), vectors=file)
        print("small", small, flush=True)
        large = process("--build", f"{folder}/large", str(LARGE), vectors=file)
        print("large", large, flush=True)
        exact = faiss.IndexFlatIP(every.shape[1])
        exact.add(every[:LARGE])
        right = exact.search(queries, 10)[1]
        del exact
        found = process("--ask", f"{folder}/large", str(LARGE), vectors=file)
        graph = faiss.IndexHNSWFlat(every.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = BUILD_BREADTH, SEARCH_BREADTH
        started = time.perf_counter()
        graph.add(every[:LARGE])
        peer_build = time.perf_counter() - started
        theirs, took = [], []
        for query in queries:
            started = time.perf_counter()
            theirs.append(graph.search(query[None], 10)[1][0])
            took.append(1000 * (time.perf_counter() - started))

    def recall(hits: Any) -> float:
        return float(np.mean([len(set(map(int, one)) & set(best.tolist())) / 10 for one, best in zip(hits, right, strict=True)]))

    figures: dict[str, Any] = {
        "search_ms": statistics.median(found["ms"]), "search_ms_95": float(np.quantile(found["ms"], 0.95)), "recall_at_10": recall(found["hits"]),
        "small_build_mb": small["mb"], "large_build_mb": large["mb"], "small_build_seconds": small["seconds"], "large_build_seconds": large["seconds"],
        "search_private_mb": found["mb"] - found["before"], "vectors_mb": LARGE * every.shape[1] * 4 / 2**20,
        "peer_ms": statistics.median(took), "peer_recall_at_10": recall(theirs), "peer_build_seconds": peer_build,
    }  # fmt: skip
    for name, value in figures.items():
        print(f"  {name:24} {value:.4g}")
    if QUICK:
        return
    record_peer(
        "index_size",
        f"faiss-cpu {version('faiss-cpu')}: one IndexHNSWFlat in memory",
        figures=figures,
        expects=EXPECTS,
        sizes={"vectors": LARGE, "small": SMALL, "width": int(every.shape[1]), "real_vectors": len(known), "queries": ASKED},
        seconds=time.perf_counter() - began,
        notes=[
            "search_ms: one query at a time, its passages read from the database, without the time of encoding the query; the median, and the 95th percentile",
            "build: from an iterator of passages, with the database and 131,072 vectors to a segment; mb: the peak above that of the loaded encoder",
            "all vectors but the real ones are mixtures of two real ones of random shares",
        ],
    )


if __name__ == "__main__":
    if "--build" in sys.argv:
        build(*sys.argv[2:4])
    elif "--ask" in sys.argv:
        ask(*sys.argv[2:4])
    else:
        with runtime.using(progress=False):
            main()
