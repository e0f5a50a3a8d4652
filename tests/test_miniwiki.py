"""The embedded world: its questions follow from its pages, and test worlds know nothing of training worlds."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carl_gym.agents.scripted import ByteTranscript, OraclePolicy
from carl_gym.envs.miniwiki import BOILERPLATE, COUNTS, World, generate, vocabulary
from carl_gym.envs.registration import make_task
from carl_gym.errors import ConfigError, StateError
from carl_gym.evaluation import evaluate

HOPS = (2, 3, 4)
RELATIONS = vocabulary()["relations"]
KIND = {subkind: kind for kind, subkinds in vocabulary()["kinds"].items() for subkind in subkinds}
PEOPLE = {"director", "composer", "writer", "founder"}


@pytest.fixture(scope="module", params=["train", "test"])
def world(request: pytest.FixtureRequest) -> World:
    return generate(3, split=request.param, questions=300, hops=HOPS)


def texts(world: World) -> dict[str, str]:
    """Text of the page of each entity; a noisy copy never comes first here, because `noise` is 0."""
    return {passage.title: passage.text for passage in world.passages if passage.title in world.pages}


def facts(world: World) -> set[tuple[str, str, str, str]]:
    """(kind, name, relation, object) of everything that the world states."""
    return {
        (KIND[page.subkind], page.name, relation, name)
        for page in world.pages.values()
        for relation, (name, _) in page.facts.items()
    }


# -- determinism and sizes -------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_world_and_others_another():
    one = generate(5, split="test", questions=50, noise=0.3)
    assert generate(5, split="test", questions=50, noise=0.3) == one
    others = [generate(6, split="test", questions=50, noise=0.3), generate(5, split="train", questions=50, noise=0.3)]
    assert all(other.passages != one.passages and other.questions != one.questions for other in others)


def test_worlds_that_differ_in_hops_do_not_take_each_others_states():
    tasks = [make_task("carl/MiniWiki-v0", questions=20, hops=hops) for hops in ((2, 3), [2, 3], (2,), (3, 2))]
    assert len({task.corpus.fingerprint for task in tasks}) == 1
    first, again, *others = tasks
    assert list(again.questions) == list(first.questions) == [f"miniwiki-train0-{n}" for n in range(20)]
    for task in others:
        assert not set(task.questions) & set(first.questions)
        with pytest.raises(StateError, match="is not among the questions"):
            task.validate(first.initial(next(iter(first.questions.values()))))


def test_a_world_does_not_depend_on_the_process():
    program = "from carl_gym import make_task; t = make_task('carl/MiniWiki-v0', world=2, questions=20); " + (
        "print(t.corpus.fingerprint, [q.text for q in t.questions.values()])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(-(10**6), 10**6),
    split=st.sampled_from(["train", "test"]),
    count=st.integers(1, 300),
    hops=st.lists(st.sampled_from(HOPS), min_size=1, max_size=4),
)
def test_any_world_has_as_many_questions_as_asked_for_and_of_those_hops(seed, split, count, hops):
    world = generate(seed, split=split, questions=count, hops=hops)
    assert len({question.id for question in world.questions}) == count
    assert {len(question.decomposition) for question in world.questions} <= set(hops)
    assert all(question.type == f"{len(question.decomposition)}hop" for question in world.questions)


@pytest.mark.parametrize(("seed", "split"), [(451, "train"), (805, "train"), (1389, "test")])
def test_a_world_in_which_a_relation_has_no_allowed_object_leaves_the_fact_out(seed, split):
    world = generate(seed, split=split, questions=50)
    missing = [
        (KIND[page.subkind], relation)
        for page in world.pages.values()
        for relation, spec in RELATIONS.items()
        if (spec["subject"] == KIND[page.subkind] or (spec["subject"] == "person" and KIND[page.subkind] in PEOPLE))
        and relation not in page.facts
    ]
    assert len(missing) == 1


def test_every_entity_has_one_page_and_titles_are_unique(world):
    pages = [passage.title for passage in world.passages if passage.title in world.pages]
    assert sorted(pages) == sorted(world.pages)
    assert len(set(pages)) == len(pages) == sum(COUNTS.values())
    assert Counter(KIND[page.subkind] for page in world.pages.values()) == COUNTS
    assert len({passage.id for passage in world.passages}) == len(world.passages)


# -- questions follow from the pages ---------------------------------------------------------------


def test_each_hop_is_stated_on_the_page_with_its_gold_title(world):
    pages = texts(world)
    for question in world.questions:
        for hop in question.decomposition:
            assert hop.answer in pages[hop.title]


def test_a_chain_leads_from_page_to_page_to_the_answer(world):
    for question in world.questions:
        here: str | None = question.decomposition[0].title
        for hop in question.decomposition:
            assert hop.title == here
            name, here = world.pages[hop.title].facts[hop.relation]
            assert name == hop.answer
        assert question.answers == (name,)
        assert question.supporting_titles == tuple(hop.title for hop in question.decomposition)


def test_a_chain_has_one_answer_and_is_asked_once(world):
    chains = [(q.decomposition[0].title, *(hop.relation for hop in q.decomposition)) for q in world.questions]
    assert len(set(chains)) == len(chains)


def test_the_answer_is_not_in_the_question_and_no_name_comes_twice(world):
    for question in world.questions:
        names = [
            world.pages[question.decomposition[0].title].name,
            *(hop.answer for hop in question.decomposition),
        ]
        assert len(set(names)) == len(names)
        assert question.answers[0] not in question.text


def test_the_question_names_its_start_so_that_only_one_page_fits(world):
    for question in world.questions:
        start = world.pages[question.decomposition[0].title]
        assert f"the {start.subkind} {start.name}" in question.text
        assert sum((p.subkind, p.name) == (start.subkind, start.name) for p in world.pages.values()) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_oracle_answers_every_question_within_the_turn_budget(split):
    task = make_task("carl/MiniWiki-v0", world=1, split=split, questions=150, hops=HOPS)
    scores = evaluate(task, OraclePolicy(task), ByteTranscript(), list(task.questions.values()), temperature=0.0)
    assert (scores.em, scores.f1, scores.invalid, scores.gold_title_opened) == (1.0, 1.0, 0.0, 1.0)


# -- phrasings -------------------------------------------------------------------------------------


def test_every_relation_has_at_least_eight_different_statements():
    for name, relation in RELATIONS.items():
        assert len(set(relation["statements"])) == len(relation["statements"]) >= 8, name
        assert len(set(relation["phrases"])) == len(relation["phrases"]) >= 4, name


def statement_ranks(world: World) -> Counter[int]:
    """How often the k-th statement of a relation stands on a page, for every fact; exactly one does."""
    ranks: Counter[int] = Counter()
    pages = texts(world)
    for title, page in world.pages.items():
        kind = KIND[page.subkind]
        subject = f"the {kind}" if kind in ("film", "book") else page.name
        sentences = {sentence.strip() for sentence in pages[title].removesuffix(".").split(". ")}
        for relation, (name, other) in page.facts.items():
            shown = f"{world.pages[other].subkind} {name}" if relation == "spouse" and other else name
            rendered = [t.format(s=subject, o=shown).removesuffix(".") for t in RELATIONS[relation]["statements"]]
            found = [rank for rank, text in enumerate(rendered) if text[0].upper() + text[1:] in sentences]
            assert len(found) == 1, (title, relation, pages[title])
            ranks[found[0] - len(rendered)] += 1
    return ranks


def test_the_last_two_statements_of_a_relation_stand_in_test_worlds_only():
    train = sum((statement_ranks(generate(seed, split="train", questions=1)) for seed in range(6)), Counter())
    test = statement_ranks(generate(0, split="test", questions=1))
    assert set(train) == {-8, -7, -6, -5, -4, -3}
    assert set(test) == {-8, -7, -6, -5, -4, -3, -2, -1}


def test_the_last_phrase_of_a_relation_is_asked_in_test_worlds_only():
    def wordings(question, world: World, last: int | None) -> set[str]:
        """All texts of the question that can be made of the phrases up to `last`."""
        start = world.pages[question.decomposition[0].title]
        inner = {f"the {start.subkind} {start.name}"}
        for hop in question.decomposition:
            phrases = RELATIONS[hop.relation]["phrases"][:last]
            inner = {phrase.format(x=x) for phrase, x in itertools.product(phrases, inner)}
        kind = RELATIONS[question.decomposition[-1].relation]["object"]
        forms = vocabulary()["questions"]["person" if kind in PEOPLE else kind][:last]
        return {form.format(np=x) for form, x in itertools.product(forms, inner)}

    train, test = (generate(0, split=split, questions=100, hops=(2, 3)) for split in ("train", "test"))
    assert all(question.text in wordings(question, train, -1) for question in train.questions)
    assert all(question.text in wordings(question, test, None) for question in test.questions)
    assert any(question.text not in wordings(question, test, -1) for question in test.questions)


# -- train and test --------------------------------------------------------------------------------


def test_no_test_world_shares_a_fact_with_a_training_world():
    train = set().union(*(facts(generate(seed, split="train", questions=1)) for seed in range(-15, 15)))
    test = set().union(*(facts(generate(seed, split="test", questions=1)) for seed in range(15)))
    assert len(train) > 10_000 and len(test) > 5_000
    assert not train & test


def test_worlds_of_one_split_may_share_facts_so_the_hash_is_what_keeps_splits_apart():
    one, two = (
        set().union(*(facts(generate(seed, split="test", questions=1)) for seed in seeds))
        for seeds in (range(15), range(15, 30))
    )
    assert one & two


# -- what makes it hard ----------------------------------------------------------------------------


def namesakes(world: World) -> int:
    counts = Counter(page.name for page in world.pages.values())
    return sum(counts[page.name] > 1 for page in world.pages.values())


def test_ambiguity_makes_namesakes_that_the_title_tells_apart():
    some, many = (generate(1, questions=1, ambiguity=share) for share in (0.0, 0.8))
    assert namesakes(many) > 100 > 2 * namesakes(some)
    for title, page in many.pages.items():
        assert title in (page.name, f"{page.name} ({page.subkind})")
    for title, page in many.pages.items():
        works = [p for p in many.pages.values() if p.name == page.name]
        if len(works) > 1 and KIND[page.subkind] in ("film", "book", *PEOPLE):
            assert title == f"{page.name} ({page.subkind})"


def test_a_world_with_all_the_namesakes_that_titles_can_tell_apart_is_still_made():
    world = generate(0, questions=50, ambiguity=1.0)
    assert len(world.pages) == sum(COUNTS.values())
    assert namesakes(world) > 200


def test_distractors_add_pages_under_near_duplicate_titles_that_state_no_fact():
    entities = sum(COUNTS.values())
    assert len(generate(0, questions=1, distractors=0.0).passages) == entities
    world = generate(0, questions=1, distractors=0.5)
    extra = [passage for passage in world.passages if passage.title not in world.pages]
    assert len(extra) == round(0.5 * entities)
    names = {page.name for page in world.pages.values()}
    for passage in extra:
        name, kind = passage.title.removesuffix(")").rsplit(" (", 1)
        assert name in names and kind in ("song", "ship", "street")
        assert passage.text.startswith(f"{name} is a {kind}.")


def test_noise_adds_cut_off_copies_with_boilerplate():
    plain, noisy = (generate(0, questions=1, noise=share) for share in (0.0, 0.25))
    copies = [passage for passage in noisy.passages if passage.text.startswith(BOILERPLATE)]
    assert not any(BOILERPLATE in passage.text for passage in plain.passages)
    assert len(copies) == round(0.25 * len(plain.passages)) == len(noisy.passages) - len(plain.passages)
    originals = {passage.title: passage.text for passage in plain.passages}
    for copy in copies:
        assert originals[copy.title].startswith(copy.text.removeprefix(f"{BOILERPLATE} "))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'train' and 'test'"),
        ({"questions": 0}, "questions >= 1"),
        ({"hops": ()}, "hops out of 2, 3, 4"),
        ({"hops": (1, 2)}, "hops out of 2, 3, 4"),
        ({"hops": (2,), "questions": 5000}, "fewer than 5000 questions"),
        ({"distractors": -0.1}, "distractors=-0.1"),
        ({"noise": 1.5}, "noise=1.5"),
        ({"ambiguity": 1.1}, "ambiguity=1.1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(0, **arguments)


@pytest.mark.parametrize(
    "wrong", [{"hops": 5}, {"questions": "q.jsonl"}, {"noise": "a"}, {"seed": "a"}, {"hops": "23"}]
)
def test_arguments_of_the_wrong_type_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="MiniWiki needs"):
        generate(**{"seed": 0, **wrong})  # type: ignore[arg-type]
