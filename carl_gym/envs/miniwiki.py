"""The embedded training world: a seed becomes a small encyclopedia and multi-hop questions about it.

    seed -> entities with (often shared) names -> facts -> short passages + chains of 2 to 4 hops as questions

Training and test worlds share name parts but no fact: whether "subject, relation, object" may hold is decided by
a hash of the three, even for training and odd for test. Some phrasings are used by test worlds only.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from carl_gym.envs.state import Hop, Question
from carl_gym.errors import ConfigError
from carl_gym.retrieval.corpus import Passage

Split = Literal["train", "test"]

PEOPLE = ("director", "composer", "writer", "founder")
COUNTS = {
    "film": 60,
    "book": 60,
    "director": 30,
    "composer": 30,
    "writer": 40,
    "founder": 24,
    "company": 36,
    "city": 44,
    "country": 14,
}
COMPANY_SUFFIXES = ("Pictures", "Press", "Works")
CITY_PREFIXES = ("Port", "New", "Upper")
BOILERPLATE = "This page needs more sources."
HOPS = (2, 3)
"""The possible numbers of hops, unless others are asked for."""
MISSES = 5000
"""So many draws in a row without a new question, and the world counts as used up."""


@dataclass(frozen=True, slots=True)
class World:
    """A generated encyclopedia and the questions that it answers.

    Attributes:
        questions: each with gold titles and decomposition.
        passages: one page per entity, plus distractor pages, in shuffled order.
        pages: what the page of each title states, for making expert traces; never shown to an agent.
    """

    questions: tuple[Question, ...]
    passages: tuple[Passage, ...]
    pages: dict[str, Page]


@dataclass(frozen=True, slots=True)
class Page:
    """The content of an entity's page: what it is, and relation -> (object's name, title of the object's page)."""

    name: str
    subkind: str
    facts: dict[str, tuple[str, str | None]]


@dataclass(eq=False, slots=True)
class Entity:
    """Something with a page. `facts` maps a relation to its object: an entity, or a plain name."""

    kind: str
    subkind: str
    name: str
    title: str = ""
    facts: dict[str, Entity | str] = field(default_factory=dict)


@functools.cache
def vocabulary() -> dict[str, dict[str, Any]]:
    """Name pools and phrasings (`carl_gym/data/miniwiki.toml`)."""
    text = (resources.files("carl_gym") / "data" / "miniwiki.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def generate(
    seed: int,
    *,
    split: Split = "train",
    questions: int = 600,
    hops: Sequence[int] = HOPS,
    ambiguity: float = 0.5,
    distractors: float = 0.2,
    noise: float = 0.0,
) -> World:
    """Generate a world; the same arguments give the same world on every machine.

    Args:
        seed: which world of the split.
        split: `test` worlds share no fact with `train` worlds and use phrasings of their own.
        questions: how many; all different.
        hops: the possible numbers of hops; one that stands twice is twice as likely.
        ambiguity: chance that a new entity takes the name of an older one of another kind.
        distractors: pages without useful facts under near-duplicate titles, as a share of the entity pages.
        noise: share of pages with a boilerplate sentence and a cut-off second copy, as crawled text has.

    Raises:
        ConfigError: an argument out of range, or more questions than the world has.
    """
    shares = {"ambiguity": ambiguity, "distractors": distractors, "noise": noise}
    numbers = {"world": seed, "questions": questions, **shares}
    for name, value in numbers.items():
        whole = name in ("world", "questions")
        if type(value) is not int and (whole or type(value) is not float):
            raise ConfigError(f"{name}={value!r}: MiniWiki needs a {'whole ' if whole else ''}number here")
    if isinstance(hops, (str, int)):
        raise ConfigError(f"hops={hops!r}: MiniWiki needs a list, such as (2, 3)")
    if split not in ("train", "test"):
        raise ConfigError(f"split is {split!r}; MiniWiki has 'train' and 'test'")
    if questions < 1 or not hops or not set(hops) <= {2, 3, 4}:
        raise ConfigError(f"questions={questions}, hops={tuple(hops)}: need questions >= 1 and hops out of 2, 3, 4")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share} is not within 0 and 1")
    rng = random.Random(f"miniwiki {split} {seed}")
    entities = _name_entities(rng, ambiguity)
    _draw_facts(rng, entities, split)
    pages = [(entity.title, _page(rng, entity, split)) for entity in entities]
    pages += [_distractor(rng, entities) for _ in range(round(distractors * len(entities)))]
    for title, text in rng.sample(pages, round(noise * len(pages))):
        pages.append((title, f"{BOILERPLATE} {text.split('. ')[0].removesuffix('.')}."))
    rng.shuffle(pages)
    passages = tuple(Passage(f"mw{seed}-{i}", title, text) for i, (title, text) in enumerate(pages))
    content = {
        e.title: Page(
            e.name, e.subkind, {r: (_name(o), None if isinstance(o, str) else o.title) for r, o in e.facts.items()}
        )
        for e in entities
    }
    return World(_ask(rng, entities, split, seed, questions, tuple(hops)), passages, content)


def _name_entities(rng: random.Random, ambiguity: float) -> list[Entity]:
    """All entities of a world. (kind, subkind, name) is unique; shared names get a title with the subkind."""
    pools = {key: words.split() for key, words in vocabulary()["names"].items()}

    def fresh(kind: str) -> str:
        match kind:
            case "film" | "book":
                return f"{rng.choice(pools['adjective'])} {rng.choice(pools['noun'])}"
            case "company":
                return f"{rng.choice(pools['company'])} {rng.choice(COMPANY_SUFFIXES)}"
            case "city":
                prefix = f"{rng.choice(CITY_PREFIXES)} " if rng.random() < 0.2 else ""
                return prefix + rng.choice(pools["city"])
            case "country":
                return rng.choice(pools["country"])
        return f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"

    entities: list[Entity] = []
    seen: set[tuple[str, str]] = set()
    named: dict[str, list[str]] = defaultdict(list)  # namesakes only within works, and within people
    for kind, count in COUNTS.items():
        family = "person" if kind in PEOPLE else "work" if kind in ("film", "book") else kind
        for _ in range(count):
            for attempt in itertools.count():
                subkind = rng.choice(vocabulary()["kinds"][kind])
                borrow = family in ("person", "work") and named[family] and rng.random() < ambiguity
                borrow = borrow and attempt < 100  # at high ambiguity every old name can be taken
                name = rng.choice(named[family]) if borrow else fresh(kind)
                if (subkind, name) not in seen:
                    break
            seen.add((subkind, name))
            named[family].append(name)
            entities.append(Entity(kind, subkind, name))
    for entity in entities:
        family = "person" if entity.kind in PEOPLE else "work"
        shared = named[family].count(entity.name) > 1
        entity.title = f"{entity.name} ({entity.subkind})" if shared else entity.name
    rng.shuffle(entities)
    return entities


def _of_kind(entities: list[Entity], kind: str) -> list[Entity]:
    return [e for e in entities if e.kind == kind or (kind == "person" and e.kind in PEOPLE)]


def _allowed(subject: Entity, relation: str, name: str, split: Split) -> bool:
    """Whether a fact may hold in this split: a hash keeps training and test facts apart."""
    digest = hashlib.blake2b(f"{subject.kind}|{subject.name}|{relation}|{name}".encode(), digest_size=1).digest()
    return digest[0] % 2 == (split == "test")


def _draw_facts(rng: random.Random, entities: list[Entity], split: Split) -> None:
    for relation, spec in vocabulary()["relations"].items():
        names = vocabulary()["names"].get(spec["object"], "") if spec["object"] in ("river", "currency") else ""
        objects: list[Entity | str] = list(names.split()) if names else list(_of_kind(entities, spec["object"]))
        for subject in _of_kind(entities, spec["subject"]):
            candidates = [o for o in objects if o is not subject and _allowed(subject, relation, _name(o), split)]
            if candidates:  # a small pool may hold none of this split; then the page does not say
                subject.facts[relation] = rng.choice(candidates)


def _name(thing: Entity | str) -> str:
    return thing if isinstance(thing, str) else thing.name


def _of_split(phrasings: list[str], split: Split, held_out: int) -> list[str]:
    """Training worlds never use the last `held_out` phrasings; test worlds use all."""
    return phrasings if split == "test" else phrasings[:-held_out]


def _page(rng: random.Random, entity: Entity, split: Split) -> str:
    sentences = []
    for relation, thing in entity.facts.items():
        template = rng.choice(_of_split(vocabulary()["relations"][relation]["statements"], split, 2))
        # A married person is named with the profession, which is what tells namesakes apart.
        named = f"{thing.subkind} {thing.name}" if relation == "spouse" and isinstance(thing, Entity) else _name(thing)
        subject = entity.name if entity.kind not in ("film", "book") else f"the {entity.kind}"
        sentence = template.format(s=subject, o=named)
        sentences.append(sentence[0].upper() + sentence[1:])
    rng.shuffle(sentences)
    return " ".join([f"{entity.name} is a {entity.subkind}.", *sentences])


def _distractor(rng: random.Random, entities: list[Entity]) -> tuple[str, str]:
    """A page under a near-duplicate title that says nothing of use."""
    entity = rng.choice(entities)
    what, sentence = rng.choice(
        [
            ("song", "The song is about a long journey."),
            ("ship", "The ship was broken in the north."),
            ("street", "It is a quiet road."),
        ]
    )
    return f"{entity.name} ({what})", f"{entity.name} is a {what}. {sentence}"


def _ask(
    rng: random.Random, entities: list[Entity], split: Split, seed: int, count: int, hops: tuple[int, ...]
) -> tuple[Question, ...]:
    vocab = vocabulary()
    # The pages do not depend on the hops, so the ids must: a state would pass for one of another question.
    mark = "" if hops == HOPS else f"hops{''.join(map(str, hops))}-"
    asked: set[tuple[str, ...]] = set()
    questions: list[Question] = []
    misses = 0
    while misses < MISSES:
        misses += 1
        chain, end = _walk(rng, rng.choice(entities), rng.choice(hops))
        key = (chain[0][0].title if chain else "", *(relation for _, relation in chain))
        if end is None or key in asked:
            continue
        asked.add(key)
        misses = 0
        phrase = f"the {chain[0][0].subkind} {chain[0][0].name}"
        for _, relation in chain:
            phrase = rng.choice(_of_split(vocab["relations"][relation]["phrases"], split, 1)).format(x=phrase)
        kind = vocab["relations"][chain[-1][1]]["object"]
        form = rng.choice(_of_split(vocab["questions"]["person" if kind in PEOPLE else kind], split, 1))
        decomposition = tuple(Hop(e.title, relation, _name(e.facts[relation])) for e, relation in chain)
        questions.append(
            Question(
                id=f"miniwiki-{split}{seed}-{mark}{len(questions)}",
                text=form.format(np=phrase),
                answers=(_name(end),),
                supporting_titles=tuple(hop.title for hop in decomposition),
                type=f"{len(chain)}hop",
                decomposition=decomposition,
            )
        )
        if len(questions) == count:
            return tuple(questions)
    raise ConfigError(f"a MiniWiki world has fewer than {count} questions of {hops} hops; ask for fewer or add hops")


def _walk(rng: random.Random, start: Entity, hops: int) -> tuple[list[tuple[Entity, str]], Entity | str | None]:
    """A random chain of facts that visits no name twice; the end is None where there is none."""
    chain: list[tuple[Entity, str]] = []
    names = {start.name}
    here: Entity | str = start
    for _ in range(hops):
        if isinstance(here, str):
            return chain, None
        relation = rng.choice(list(here.facts))
        chain.append((here, relation))
        here = here.facts[relation]
        if _name(here) in names:
            return chain, None
        names.add(_name(here))
    return chain, here
