"""Questions and passages of an environment: found, read, checked and labelled with where they come from.

`carl/HotpotQA-v0` takes the first of: the `data_dir` argument; a folder of CARL_GYM_DATA; the `datasets`
cache; the Hugging Face hub; the mini set in the package, with a warning. `carl/MiniWiki-v0` is generated.
A folder holds questions.jsonl and corpus.jsonl, plain or .gz.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carl_gym.envs.miniwiki import Split, generate
from carl_gym.envs.state import Question
from carl_gym.errors import DataError
from carl_gym.paths import PACKAGE
from carl_gym.retrieval.corpus import Corpus, Passage, read_jsonl, text_field

HUB = {"hotpotqa": ("hotpotqa/hotpot_qa", "fullwiki")}
"""Data sets that the hub has: repository and configuration."""

PROBE_SECONDS = 5.0
"""How long to wait for the hub before doing without it."""


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
    hops: Sequence[int] = (2, 3),
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


def load_named(name: str, *, data_dir: str | Path | None = None, split: str | None = None) -> Data:
    """Load a named data set from the first place that has it.

    Args:
        name: such as `hotpotqa`.
        data_dir: a folder with questions.jsonl and corpus.jsonl; nothing else is tried.
        split: which split to take from the hub: `validation` (the default) or `train`. Folders have no splits.

    Raises:
        DataError: the data is malformed, no place has it, or a split is asked of a folder.
    """
    if data_dir is not None:
        return load_folder(Path(data_dir), name, split)
    reasons = []
    if root := os.environ.get("CARL_GYM_DATA"):
        folder = Path(root) / name
        if folder.is_dir():
            return load_folder(folder, name, split)
        reasons.append(f"CARL_GYM_DATA has no folder {folder}")
    else:
        reasons.append("CARL_GYM_DATA is not set")
    if name in HUB:
        found = load_hub(*HUB[name], split or "validation")
        if isinstance(found, Data):
            return found
        reasons.append(found)
    how = f"pass data_dir= or set CARL_GYM_DATA to a folder that holds {name}/questions.jsonl and {name}/corpus.jsonl"
    mini = PACKAGE / "data" / f"mini_{name}"
    if not mini.is_dir():
        raise DataError(f"no data for {name!r} ({'; '.join(reasons)}); {how}")
    data = load_folder(mini, name, split)
    source = f"mini set ({len(data.questions)} questions, {len(data.corpus)} passages)"
    warnings.warn(
        f"using the {source} instead of {name}: {'; '.join(reasons)}. Scores on it are not {name} scores. "
        f"For the real data, {how}" + (" (or connect to the hub once)." if name in HUB else "."),
        stacklevel=2,
    )
    return Data(data.questions, data.corpus, source, is_mini=True)


def load_folder(folder: Path, name: str, split: str | None = None) -> Data:
    """Read questions.jsonl and corpus.jsonl (plain or .gz). Raises DataError naming file, line and key."""
    if split is not None:
        raise DataError(f"split={split!r}: {folder} has no splits; leave split out, or make a folder per split")
    corpus = Corpus.load(_find(folder, "corpus.jsonl"))
    questions = tuple(read_questions(_find(folder, "questions.jsonl")))
    return Data(questions, corpus, f"{name}:{folder} ({len(questions)} questions, {len(corpus)} passages)")


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a JSON-lines file.

    A record has `id`, `question`, `answers` (a list) or `answer` (a text), and optionally
    `supporting_titles` and `type`; other keys are ignored.
    """
    lines: dict[str, int] = {}
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        question = Question(
            id=text_field(record, "id", where),
            text=text_field(record, "question", where),
            answers=_answers(record, where),
            supporting_titles=_titles(record.get("supporting_titles", []), where),
            type=str(record.get("type") or ""),
        )
        if (first := lines.setdefault(question.id, number)) != number:
            raise DataError(f"{where}: id {question.id!r} was already used in line {first}; ids must be unique")
        yield question
    if not lines:
        raise DataError(f"{path}: there are no questions in this file")


def from_hotpot_records(records: Iterable[Mapping[str, Any]], source: str) -> Data:
    """Questions and passages from records in HotpotQA's original schema.

    The corpus is made of the records' contexts, one passage per title (HotpotQA's titles are unique).

    Raises:
        DataError: names the record and the key.
    """
    questions: list[Question] = []
    passages: dict[str, Passage] = {}
    for number, record in enumerate(records):
        where = f"{source}, record {number}"
        supporting, context = (_table(record, key, where) for key in ("supporting_facts", "context"))
        for title, sentences in zip(context["title"], context["sentences"], strict=True):
            text = "".join(sentences).strip()
            if text:
                passages.setdefault(title, Passage(title, title, text))
        questions.append(
            Question(
                id=text_field(dict(record), "id", where),
                text=text_field(dict(record), "question", where),
                answers=(text_field(dict(record), "answer", where),),
                supporting_titles=_titles(list(supporting["title"]), where),
                type=str(record.get("type") or ""),
            )
        )
    corpus = Corpus(passages.values(), source)
    return Data(tuple(questions), corpus, f"{source} ({len(questions)} questions, {len(corpus)} passages)")


def load_hub(repository: str, config: str, split: str) -> Data | str:
    """HotpotQA from the `datasets` cache, else from the hub; a text that says why if neither has it.

    The cache is asked first and without network. The hub is asked whether it is there before `datasets`
    starts its retries, which take half a minute on a machine without network.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split={split!r}: the splits with answers are 'train' and 'validation'")
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        return f"the package `datasets` cannot be imported ({error})"

    source = f"{repository}, {config}, {split}"
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = True
        records = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError):
        records = None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if records is None:
        if offline:
            return f"{repository} is not in the datasets cache, and offline mode is on"
        try:
            HfApi().dataset_info(repository, timeout=PROBE_SECONDS)
            records = datasets.load_dataset(repository, config, split=split)
        except Exception as error:  # whatever network and hub come up with: the caller reports it
            return f"the hub has not given {repository} ({type(error).__name__}: {error})"
    return from_hotpot_records(records, source)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: has neither {name} nor {name}.gz; a data folder holds questions.jsonl and corpus.jsonl")


def _answers(record: dict[str, object], where: str) -> tuple[str, ...]:
    answers = record.get("answers", record.get("answer"))
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: key 'answers' is {answers!r}; expected a list of texts (or 'answer', a text)")
    kept = tuple(answer for answer in answers if answer.strip())
    if not kept:
        raise DataError(f"{where}: the question has no answer; remove it or give 'answers' at least one text")
    return kept


def _titles(titles: object, where: str) -> tuple[str, ...]:
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise DataError(f"{where}: key 'supporting_titles' is {titles!r}; expected a list of texts")
    return tuple(dict.fromkeys(titles))


def _table(record: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A list-of-structs column, which `datasets` gives as a dict of lists."""
    value = record.get(key)
    if isinstance(value, list):
        value = {name: [row[name] for row in value] for name in (value[0] if value else ("title", "sentences"))}
    if not isinstance(value, Mapping) or "title" not in value:
        raise DataError(f"{where}: key {key!r} is {value!r:.80}; expected HotpotQA's table with a 'title' column")
    return value
