"""BM25 on generated corpora: build, size, load and search, beside bm25s on the same index. Prints a Markdown table."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from carl_gym.retrieval import Corpus, Passage, bm25
from carl_gym.retrieval.analysis import analyze
from carl_gym.retrieval.bm25 import BM25

HEAD = (
    "passages", "build s", "index MB", "peak RSS MB", "load ms", "numpy q/s", "compiled q/s, 1", "compiled q/s, 64",
    "bm25s q/s, 64",
)  # fmt: skip


def synthetic(size: int, seed: int = 0) -> Iterator[Passage]:
    """Passages of 60 words, Zipf-distributed over 200,000."""
    rng = np.random.default_rng(seed)
    for i in range(size):
        words = np.minimum(rng.zipf(1.1, 60), 200_000)
        yield Passage(str(i), f"Title{i}", " ".join(f"w{word}" for word in words))


def rate(search: Callable[[], object], queries: int) -> float:
    search()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        search()
        times.append(time.perf_counter() - start)
    return queries / min(times)


def measure(corpus: Corpus) -> list[str]:
    import bm25s

    start = time.perf_counter()
    built = BM25(corpus)
    build = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # the corpus included
    with TemporaryDirectory() as name:
        folder = Path(name)
        built.save(folder)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        start = time.perf_counter()
        index = BM25.load(folder, corpus)
        load = (time.perf_counter() - start) * 1000
        rng = np.random.default_rng(1)
        texts = [corpus[corpus.ids[row]].text.split() for row in rng.integers(len(corpus), size=64)]
        queries = [" ".join(rng.choice(words, 8)) for words in texts]  # words of the corpus, as often as they occur
        rates = []
        for kernel, batch in ((None, 1), (bm25._kernel(), 1), (bm25._kernel(), len(queries))):
            bm25._kernel_for = lambda work, kernel=kernel: kernel  # type: ignore[misc]
            batches = [queries[i : i + batch] for i in range(0, len(queries), batch)]
            rates.append(rate(lambda batches=batches: [index.search(b, 10) for b in batches], len(queries)))  # type: ignore[misc]
        other = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        tokens = [analyze(query) for query in queries]
        rates.append(rate(lambda: other.retrieve(tokens, k=10, show_progress=False), len(queries)))
    numbers = (len(corpus), build, size, peak, load, *rates)
    return [f"{number:,.1f}" if number < 100 else f"{number:,.0f}" for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--data-dir", type=Path, help="a folder with corpus.jsonl(.gz): measure it as well")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row in a process of its own, for its peak memory
    args = parser.parse_args()
    if args.row:
        corpus = Corpus(synthetic(int(args.row))) if args.row.isdigit() else Corpus.load(args.row)
        print("|", " | ".join(measure(corpus)), "|")
        return
    print("|", " | ".join(HEAD), "|")
    print("|" + "---:|" * len(HEAD))
    rows = [str(size) for size in args.sizes]
    if args.data_dir:
        rows += [str(path) for path in sorted(args.data_dir.glob("corpus.jsonl*"))[:1]]
    for row in rows:
        subprocess.run([sys.executable, __file__, "--row", row], check=True)


if __name__ == "__main__":
    main()
