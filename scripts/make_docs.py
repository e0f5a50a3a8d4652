"""Write docs/environments/: a page per environment in the form of Gymnasium's documentation, from cards and docstrings.

python scripts/make_docs.py          # writes the pages
python scripts/make_docs.py --check  # fails when a page is not what it would write
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from carl_gym.cards import list_cards, load_card
from carl_gym.envs import data, miniwiki
from carl_gym.envs.cards import EnvCard
from carl_gym.envs.critical_tree import CriticalTreeEnv, CriticalTreeSettings
from carl_gym.envs.data_card import DataCard
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.questions import select
from carl_gym.envs.registration import CRITICAL_TREE
from carl_gym.envs.schemas import SCHEMAS
from carl_gym.envs.spaces import ActionSpace, TextSpace

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "environments"
NOTE = "<!-- Written by scripts/make_docs.py from envs/{name}.toml and docstrings: edit those. -->"
PASSAGES = {
    "contexts": "those that the records bring along, or `corpus=`",
    "wiki18": "the corpus beside the questions, else the folder `wiki18` of `CARL_GYM_DATA`, or `corpus=`",
    "union": "the corpus beside the questions, else those of all data sets in `CARL_GYM_DATA`, or `corpus=`",
    "own": "`corpus=`, or the corpus beside the questions",
}


@dataclass(frozen=True)
class Options:
    """Write the pages of the environments.

    Attributes:
        check: write nothing; exit with 1 when a page differs from what would be written.
        folder: where the pages are.
    """

    check: bool = False
    folder: Path = FOLDER


def main(options: Options) -> int:
    """Write or check every page; the exit status."""
    pages = {f"{path.stem.rpartition('-')[0]}.md": page(path) for path in list_cards("envs").values()}
    pages["CriticalTree.md"] = critical_tree_page()
    stale = [name for name, text in pages.items() if not _is_current(options.folder / name, text)]
    stale += sorted(path.name for path in options.folder.glob("*.md") if path.name not in pages)
    if options.check:
        for name in stale:
            print(f"{options.folder / name} is not current; run python scripts/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in pages:
            (options.folder / name).write_text(pages[name], encoding="utf-8")
        else:
            (options.folder / name).unlink()
        print(options.folder / name)
    return 0


def page(path: Path) -> str:
    """The page of a card."""
    card = load_card("envs", path, EnvCard)
    sections = _sections(inspect.getdoc(SearchEnv) or "")
    summary = {
        "Make": f'`gym.make("{card.id}")`, `gym.make_vec("{card.id}", num_envs=N)`',
        "Action space": f"`{ActionSpace(card.tools)}`",
        "Observation space": f"`{TextSpace()}`",
        "Tools": ", ".join(f"`{tool}`" for tool in card.tools),
        "Retriever": f"`{card.index.id}`, {card.top_k} hits per search",
        "Turns": str(card.turns),
        "Reward": f"`{card.reward}`",
    }
    parts = [f"# {path.stem.rpartition('-')[0]}", NOTE.format(name=path.stem), card.description, _table(summary)]
    for title, text in sections.items():
        if title == "Arguments":
            text = "\n\n".join([text, *_arguments(card)])
        if title == "Description" and card.data.name == "miniwiki":
            text += "\n\n" + (inspect.getdoc(miniwiki) or "").replace("    seed ->", "`seed ->").replace(
                "as questions\n", "as questions`\n"
            )
        if title == "Version History":
            parts.append(_data(card.data))
        parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def critical_tree_page() -> str:
    """The page of the exact test bench, which has no card."""
    sections = _sections(inspect.getdoc(CriticalTreeEnv) or "")
    meanings = _entries(CriticalTreeSettings, "Attributes")
    values = {
        f"`{field.name}`": (f"`{field.default!r}`", meanings[field.name])
        for field in dataclasses.fields(CriticalTreeSettings)
    }
    sections["Arguments"] += "\n\nThe shape of the world:\n\n" + _table(values, ("argument", "default", ""))
    env = CriticalTreeEnv()
    summary = {
        "Make": f'`gym.make("{CRITICAL_TREE}")`, `gym.make_vec("{CRITICAL_TREE}", num_envs=N)`',
        "Action space": f"`{env.action_space}`",
        "Observation space": f"`{env.observation_space}`",
        "Turns": str(env.task.settings.turns),
    }
    lead = "For measuring algorithms: a finite world in which everything can be computed exactly."
    note = NOTE.replace("envs/{name}.toml and docstrings", "carl_gym/envs/critical_tree.py").replace("those", "that")
    parts = ["# CriticalTree", note, lead, _table(summary)]
    return "\n\n".join([*parts, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _arguments(card: EnvCard) -> list[str]:
    """Tables of what `gymnasium.make` takes."""
    meanings = _entries(EnvCard, "Attributes")
    values = {
        f"`{field.name}`": (f"`{_shown(getattr(card, field.name))}`", meanings[field.name])
        for field in dataclasses.fields(EnvCard)
        if field.name not in ("id", "description", "data")
    }
    generated = card.data.name == "miniwiki"
    load = data.load_miniwiki if generated else data.load_named
    defaults = inspect.signature(load).parameters
    sources = _entries(miniwiki.generate, "Args") if generated else _entries(data.load_named, "Args")
    sources = {
        ("world" if name == "seed" else name): text
        for name, text in sources.items()
        if name not in ("data", "source_split")
    }
    where = {f"`{name}`": (f"`{defaults[name].default!r}`", text) for name, text in sources.items()}
    which = {
        f"`{name}`": ("`None`", text)
        for name, text in _entries(select, "Args").items()
        if name not in ("questions", "source", "source_split" if generated else "")
    }
    return [
        "Values of the card:\n\n" + _table(values, ("argument", "default", "")),
        ("The world:" if generated else "Where questions and passages come from:")
        + "\n\n" + _table(where, ("argument", "default", "")),
        "Which questions, in which order; the arguments apply from top to bottom:\n\n"
        + _table(which, ("argument", "default", "")),
    ]  # fmt: skip


def _data(card: DataCard) -> str:
    """The section on a card's data."""
    if card.name == "miniwiki":
        return f"## Data\n\n{_table({'Questions and passages': 'generated', 'Licence': card.licence})}"
    rows = {"Folder": f"`$CARL_GYM_DATA/{card.name}` with `questions.jsonl` and `corpus.jsonl`, plain or `.gz`"}
    if card.hub:
        rows["Hub"] = f"[`{card.hub}`](https://huggingface.co/datasets/{card.hub})" + (
            f", configuration `{card.config}`" if card.config else ""
        )
        splits = ", ".join(f"`{split}`" for split in card.hub_splits)
        rows["Splits with answers"] = f"{splits}; `{card.hub_split}` unless `source_split` says otherwise"
    if card.schema in SCHEMAS:
        schema = SCHEMAS[card.schema]
        rows["Schema"] = f"`{card.schema}`: {_linked(schema.description)}"
        given = dataclasses.asdict(schema.fields) | {k: v for k, v in dataclasses.asdict(card.fields).items() if v}
        rows["Fields"] = "; ".join(
            f"{name}: {' or '.join(f'`{option}`' for option in field.split('|'))}"
            for name, field in given.items()
            if field
        )
        by_code = {"supporting titles": schema.titles, "passages": schema.contexts, "decomposition": schema.hops}
        if tables := [what for what, reader in by_code.items() if reader]:
            rows["Fields"] += f"; {', '.join(tables)}: from the record's tables"
    else:
        rows["Schema"] = "by the keys of the records, one of " + ", ".join(f"`{name}`" for name in SCHEMAS)
    rows["Passages"] = PASSAGES[card.corpus]
    if card.mini:
        rows["Without data"] = 'the small set in the package stands in, with a warning; `info["source"]` says so'
    rows["Licence"] = card.licence
    if card.homepage:
        rows["Homepage"] = f"<{card.homepage}>"
    citation = f"\n\n```bibtex\n{card.citation.strip()}\n```" if card.citation else ""
    return f"## Data\n\n{_table(rows)}{citation}"


def _table(rows: dict[str, str] | dict[str, tuple[str, str]], head: tuple[str, ...] = ("", "")) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, value in rows.items():
        cells = (key, value) if isinstance(value, str) else (key, *value)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _sections(text: str) -> dict[str, str]:
    """A docstring's `## ` sections; what stands before the first one goes in front of it."""
    lead, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    sections = {}
    for part in parts:
        title, _, body = part.partition("\n")
        # Markdown wants an empty line before a list.
        sections[title] = re.sub(r"(?<=[^\n])\n(?=- )(?<!^)", "\n", body.strip())
    first = next(iter(sections))
    sections[first] = f"{lead.strip()}\n\n{sections[first]}"
    return sections


def _entries(subject: object, section: str) -> dict[str, str]:
    """The entries of an `Args:` or `Attributes:` section."""
    lines = (inspect.getdoc(subject) or "").split("\n")
    entries: dict[str, str] = {}
    name = ""
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if not line.strip():
            break
        if match := re.match(r"    (\w+): (.*)", line):
            name, entries[match[1]] = match[1], match[2]
        else:
            entries[name] += " " + line.strip()
    return {name: _linked(text) for name, text in entries.items()}


def _linked(text: str) -> str:
    return re.sub(r"(https://[^\s)]+)", r"<\1>", text)


def _shown(value: object) -> str:
    return str(getattr(value, "id", None) or repr(list(value) if isinstance(value, tuple) else value))


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
