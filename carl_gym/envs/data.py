"""Questions and passages of an environment: found, read, checked and labelled with where they come from.

    [data] of a card + arguments -> questions (argument, folder, hub or mini set) + corpus -> Data -> select -> task.py

Questions come from the first of: the arguments `questions` or `data_dir`; a folder of CARL_GYM_DATA; the `datasets`
cache; the Hugging Face hub; for cards that allow it the mini set in the package, with a warning. MiniWiki is generated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from carl_gym.envs.data_card import DataCard
from carl_gym.envs.miniwiki import HOPS, Split, generate
from carl_gym.envs.questions import VALIDATION
from carl_gym.envs.schemas import Context, Example, Record, read_examples, read_records
from carl_gym.envs.state import Question
from carl_gym.errors import ConfigError, DataError
from carl_gym.harmless import visible
from carl_gym.paths import PACKAGE
from carl_gym.retrieval import open_corpus
from carl_gym.retrieval.corpus import Corpus, Passage

if TYPE_CHECKING:
    import datasets

PROBE_SECONDS = 5.0
"""How long to wait for the hub before doing without it."""

MINI = PACKAGE / "data" / "mini_hotpotqa"
"""A few questions and passages written for this package, in place of data that is not at hand."""

WIKI18 = (
    "the Wikipedia passages of 2018 that it is searched in: build them once with `python scripts/build_index.py "
    "wiki18-bm25` (docs/retrieval.md has sizes and times) and pass the folder that it names as corpus=, or any other "
    "corpus by path or URL"
)


@dataclass(frozen=True, slots=True)
class Data:
    """What an environment is made of.

    Attributes:
        questions: in the order of the source.
        corpus: what can be retrieved.
        source: names the data, for `info` and reports.
        is_mini: the small stand-in was loaded; its scores must not be reported under the data set's name.
    """

    questions: tuple[Question, ...]
    corpus: Corpus
    source: str
    is_mini: bool = False


def load_miniwiki(
    *,
    world: int = 0,
    split: Split = "train",
    questions: int = 600,
    hops: Sequence[int] = HOPS,
    ambiguity: float = 0.5,
    distractors: float = 0.2,
    noise: float = 0.0,
) -> Data:
    """Generate world number `world`; the arguments and errors are those of `carl_gym.envs.miniwiki.generate`."""
    generated = generate(
        world,
        split=split,
        questions=questions,
        hops=hops,
        ambiguity=ambiguity,
        distractors=distractors,
        noise=noise,
    )
    source = f"MiniWiki world {world}, split {split}"
    return Data(generated.questions, Corpus(generated.passages, source), source)


def load_named(
    data: DataCard | str,
    *,
    data_dir: str | Path | None = None,
    questions: str | Path | None = None,
    corpus: str | Path | None = None,
    source_split: str | None = None,
) -> Data:
    """Load the data of a card from the first place that has it.

    Args:
        data: the card's `[data]`, or the name of a folder of CARL_GYM_DATA.
        data_dir: a folder with questions.jsonl and corpus.jsonl (plain or .gz).
        questions: a file of questions instead, in any schema of `schemas.SCHEMAS`.
        corpus: passages instead of those that come with the questions: a file, a folder with a built corpus, the URL of
            a retrieval server, or `union` for the corpora of all data sets in CARL_GYM_DATA.
        source_split: the split to take from the hub. (Folders hold what they hold; `questions.select` sorts it out.)

    Raises:
        ConfigError: an argument is no path.
        DataError: the data is malformed, no place has it, or questions have come without passages.
    """
    for name, value in (("data_dir", data_dir), ("questions", questions), ("corpus", corpus)):
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"{name}={value!r} is no path; expected a text or a pathlib.Path")
    card = DataCard(data) if isinstance(data, str) else data
    if questions is not None:
        if data_dir is not None:
            raise DataError("questions= and data_dir= both say where the questions are; pass one of them")
        return _from_examples(card, _read_file(card, Path(questions)), f"{card.name}:{questions}", corpus)
    if data_dir is not None:
        return load_folder(Path(data_dir), card, corpus)
    reasons = []
    if root := os.environ.get("CARL_GYM_DATA"):
        folder = Path(root) / card.name
        if folder.is_dir():
            return load_folder(folder, card, corpus)
        reasons.append(f"CARL_GYM_DATA has no folder {folder}")
    else:
        reasons.append("CARL_GYM_DATA is not set")
    if card.hub:
        split = _hub_split(card, source_split)
        records = load_hub(card.hub, card.config, split)
        if not isinstance(records, str):
            source = ", ".join(filter(None, (card.hub, card.config, split)))
            return from_records(records, source, card, split, corpus)
        reasons.append(records)
    how = (
        f"pass questions= and corpus= (paths), data_dir= (a folder with questions.jsonl and corpus.jsonl), or set "
        f"CARL_GYM_DATA to a folder that holds {card.name}/"
    )
    if not card.mini:
        raise DataError(f"no data for {card.name!r} ({'; '.join(reasons)}); {how}")
    loaded = load_folder(MINI, DataCard("mini"), corpus)
    source = f"mini set ({_counts(loaded)})"
    warnings.warn(
        f"using the {source} instead of {card.name}: {'; '.join(reasons)}. Scores on it are not {card.name} scores. "
        f"For the real data, {how}" + (" (or connect to the hub once)." if card.hub else "."),
        stacklevel=2,
    )
    return replace(loaded, source=source, is_mini=True)


def load_folder(folder: Path, data: DataCard | str, corpus: str | Path | None = None) -> Data:
    """Read questions.jsonl and corpus.jsonl (plain or .gz). Raises DataError naming file, line and key."""
    card = DataCard(data) if isinstance(data, str) else data
    elsewhere = corpus is not None or (card.corpus in ("wiki18", "union") and not _has(folder, "corpus.jsonl"))
    found = corpus if elsewhere else _open_corpus(_find(folder, "corpus.jsonl"))
    examples = _read_file(card, _find(folder, "questions.jsonl"))
    return _from_examples(card, examples, f"{card.name}:{folder}", found)


def from_records(
    records: Iterable[Record], source: str, card: DataCard, split: str = "", corpus: str | Path | None = None
) -> Data:
    """Questions and passages from records in the card's schema, such as a `datasets.Dataset`.

    Raises:
        DataError: names the record and the key.
    """
    numbered = ((f"{source}, record {number}", record) for number, record in enumerate(records))
    return _from_examples(card, read_examples(numbered, card.schema, card.fields, split), source, corpus)


def load_hub(repository: str, config: str, split: str) -> datasets.Dataset | str:
    """The records of a data set from the `datasets` cache, else from the hub; a text that says why if neither has it.

    The cache is asked first and without network. The hub is asked whether it is there before `datasets`
    starts its retries, which take half a minute on a machine without network.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        return f"the package `datasets` cannot be imported ({error})"

    name = config or None
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(repository, name, split=split)
    except (OSError, ValueError):
        pass  # not in the cache
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if offline:
        return f"{repository} is not in the datasets cache, and offline mode is on"
    try:
        HfApi().dataset_info(repository, timeout=PROBE_SECONDS)
        return datasets.load_dataset(repository, name, split=split)
    except Exception as error:  # whatever network and hub come up with: the caller reports it
        return f"the hub has not given {repository} ({type(error).__name__}: {error})"


# --- from examples to data --------------------------------------------------------------------------------------------


def _from_examples(
    card: DataCard, examples: Iterable[Example], source: str, corpus: Corpus | str | Path | None
) -> Data:
    questions: list[Question] = []
    contexts: dict[Context, None] = {}
    for example in examples:
        questions.append(example.question)
        if corpus is None:
            contexts.update(dict.fromkeys(context for context in example.contexts if context.text))
    if not questions:
        raise DataError(f"{source}: there are no questions")
    if contexts:
        corpus = Corpus(_numbered(contexts), source)
    passages, note = (corpus, "") if isinstance(corpus, Corpus) else _passages(card, source, corpus)
    data = Data(tuple(questions), passages, "")
    return replace(data, source=visible(f"{source}{note} ({_counts(data)})"))


def _passages(card: DataCard, source: str, corpus: str | Path | None) -> tuple[Corpus, str]:
    """A corpus that is not the questions' own, and what to say about it."""
    root = Path(os.environ["CARL_GYM_DATA"]) if os.environ.get("CARL_GYM_DATA") else None
    if corpus is None and root and card.corpus == "union":
        corpus = "union"
    if corpus is None and root and card.corpus == "wiki18" and (root / "wiki18").is_dir():
        folder = root / "wiki18"
        corpus = _find(folder, "corpus.jsonl") if _has(folder, "corpus.jsonl") else folder
    if corpus is None:
        needs = WIKI18 if card.corpus in ("wiki18", "union") else "passages: pass corpus= (a path or a server's URL)"
        raise DataError(f"{source}: the questions come without passages; this environment needs {needs}")
    if corpus != "union":
        return _open_corpus(corpus), f" over {corpus}"
    if root is None:
        raise DataError("corpus='union' unites the corpora of the data sets in CARL_GYM_DATA, which is not set")
    folders = [folder for folder in sorted(root.iterdir()) if _has(folder, "corpus.jsonl", "questions.jsonl")]
    if not folders:
        raise DataError(f"corpus='union': no folder of {root} holds both corpus.jsonl and questions.jsonl")
    passages = (passage for folder in folders for passage in _open_corpus(_find(folder, "corpus.jsonl")))
    name = f"the union of {', '.join(folder.name for folder in folders)}"
    return Corpus(passages, name), f" over {name}"


def _numbered(contexts: Iterable[Context]) -> Iterator[Passage]:
    """Passages with their titles as ids; further texts under a title get a number, as in MuSiQue."""
    used: set[str] = set()
    counts: dict[str, int] = {}
    for title, text in contexts:
        id, n = title, counts.get(title, 1)
        while id in used:
            n += 1
            id = f"{title} #{n}"
        counts[title] = n
        used.add(id)
        yield Passage(id, title, text)


def _open_corpus(corpus: str | Path) -> Corpus:
    if str(corpus).startswith(("http://", "https://")):
        from carl_gym.retrieval.remote import remote_corpus

        return remote_corpus(str(corpus))
    opened = open_corpus(corpus)
    if opened.shard:
        raise DataError(
            f"{corpus} is only shard {opened.shard} of a corpus; serve every shard (scripts/serve_retrieval.py) and "
            "give the URLs of all servers as the corpus, with ';' between shards"
        )
    return opened


def _read_file(card: DataCard, path: Path) -> Iterator[Example]:
    """The examples of a file. A benchmark's card describes the hub's records, so files speak for themselves there."""
    if card.hub:
        return read_examples(read_records(path))
    return read_examples(read_records(path), card.schema, card.fields)


def _hub_split(card: DataCard, split: str | None) -> str:
    if split is None:
        return card.hub_split
    if split in VALIDATION:
        split = next((name for name in card.hub_splits if name in VALIDATION), split)
    if card.hub_splits and split not in card.hub_splits:
        known = ", ".join(card.hub_splits)
        raise DataError(f"source_split={split!r}: the splits of {card.hub} that have answers are {known}")
    return split


def _counts(data: Data) -> str:
    return f"{len(data.questions)} questions, {len(data.corpus)} passages"


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: has neither {name} nor {name}.gz; a data folder holds questions.jsonl and corpus.jsonl")


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names)
