"""FAISS index types on clustered vectors, and the embedded encoder: speed, memory, recall, as Markdown tables.

    python benchmarks/dense_speed.py [--passages 10000 1000000] [--indexes Flat HNSW32] [--dimension 384] [--threads 1]

The vectors are drawn around seeded cluster centres and scaled to length 1; queries are drawn in the same way. recall@10
is the share of the ten exact neighbours that an index finds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from carl_gym.errors import RetrievalError
from carl_gym.retrieval import Passage
from carl_gym.retrieval.dense import number_of_lists
from carl_gym.retrieval.encoders import Encoder, EncoderSettings, Vectors

INDEXES = {
    "Flat": "",
    "HNSW32": "efSearch=128",
    "IVF{nlist},SQ8": "nprobe=32",
    "IVF{nlist},PQ48": "nprobe=32",
    "IVF{nlist},PQ48,Refine(SQ8)": "nprobe=32,k_factor_rf=8",
}
"""Recipes, and how each is searched."""

CHUNK = 65_536
"""Vectors that are drawn at once: a million take 1.5 GB as they are."""


def clustered(count: int, dimension: int, seed: int, spread: float = 0.8) -> Vectors:
    """Unit vectors around 1,000 centres, which are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((1000, dimension), dtype=np.float32)
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, len(centres), count)]
    for start in range(0, count, CHUNK):
        part = vectors[start : start + CHUNK]
        part += spread * random.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def rate(work: Callable[[], object], items: int, seconds: float = 1.0) -> float:
    """Items per second, over at least `seconds`."""
    work()
    start, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        work()
        rounds += 1
    return rounds * items / passed


def index_table(sizes: list[int], dimension: int, recipes: list[str]) -> None:
    """Flat comes first in every case: the others' recall is measured by what it finds."""
    import faiss

    print("| passages | index | search | build s | MB | q/s single | q/s in 64 | recall@10 |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    queries = clustered(512, dimension, seed=2)
    for size in sizes:
        vectors = clustered(size, dimension, seed=1)
        exact = None
        for recipe in ["Flat", *(name for name in recipes if name != "Flat")]:
            search = INDEXES[recipe]
            factory = recipe.replace("{nlist}", str(number_of_lists(size)))
            index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
            start = time.perf_counter()
            index.train(vectors[: 64 * max(1024, number_of_lists(size))])
            index.add(vectors)
            build = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "index.faiss"
                faiss.write_index(index, str(path))
                megabytes = path.stat().st_size / 1e6
                index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
                if search:
                    faiss.ParameterSpace().set_index_parameters(index, search)  # type: ignore[arg-type]
                rows = index.search(queries, 10)[1]
                exact = rows if exact is None else exact
                recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, rows, strict=True)])
                single = rate(lambda index=index: [index.search(queries[i : i + 1], 10) for i in range(16)], 16)  # type: ignore[misc]
                batch = rate(lambda index=index: index.search(queries[:64], 10), 64)  # type: ignore[misc]
            print(
                f"| {size:,} | {factory} | {search} | {build:.1f} | {megabytes:.0f} | {single:,.0f} | {batch:,.0f} "
                f"| {recall:.3f} |",
                flush=True,
            )


def encoder_table() -> None:
    sentence = "The harbour was rebuilt after the war and serves ferries to the islands in the north. "
    passages = [Passage(str(i), f"Harbour {i}", sentence * (2 + i % 8)) for i in range(64)]
    queries = [f"When was the harbour of town number {i} rebuilt?" for i in range(64)]
    try:
        encoder = Encoder(EncoderSettings())
    except RetrievalError as error:
        print(error)
        return
    print("\n| encoder | passages/s | single queries/s | queries/s in 64 |")
    print("|---|---:|---:|---:|")
    print(
        f"| {encoder.settings.encoder} | {rate(lambda: encoder.passages(passages), 64):.0f} "
        f"| {rate(lambda: [encoder.queries([query]) for query in queries[:8]], 8):.0f} "
        f"| {rate(lambda: encoder.queries(queries), 64):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000], help="corpus sizes")
    parser.add_argument("--indexes", nargs="+", default=[*INDEXES], choices=[*INDEXES], help="index types")
    parser.add_argument("--dimension", type=int, default=384, help="entries of a vector")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads")
    arguments = parser.parse_args()
    import faiss
    import torch

    faiss.omp_set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.dimension} dimensions, {arguments.threads} thread(s), faiss {faiss.__version__}\n")
    index_table(arguments.passages, arguments.dimension, arguments.indexes)
    encoder_table()


if __name__ == "__main__":
    main()
