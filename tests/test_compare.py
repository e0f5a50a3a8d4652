"""Comparing stored results: known answers, what is refused, and the script as users run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import run
from sys import executable
from typing import Any

import pytest

from carl_gym.errors import ConfigError, DataError
from carl_gym.evaluation.comparison import Comparison, compare, condition_differences, pair_up, read_sides
from carl_gym.evaluation.episodes import Episode
from scripts.compare import main
from scripts.evaluate import main as evaluate

ROOT = Path(__file__).parents[1]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a result by hand and gives its folder."""

    def call(name: str, scores: dict[str, Sequence[Sequence[float]]], *, ids: str = "abcdefgh", env: str = "e",
             judged: bool = False, **changes: Any) -> Path:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        samples = len(next(iter(scores.values()))[0])
        setting = {"source": name, "corpus_fingerprint": "c", "retriever": "BM25", "index": "bm25", "top_k": 5,
                   "questions_fingerprint": "q"}  # fmt: skip
        kept = {"temperature": 1.0, "samples": samples, "judge": None}
        summary = {key: changes.pop(key, value) for key, value in kept.items()}
        results = [{"agent": agent, "questions": len(rows)} for agent, rows in scores.items()]
        summary["environments"] = [{"env": env, "setting": setting | changes, "results": results}]
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        with (folder / "episodes.jsonl").open("w", encoding="utf-8") as file:
            for agent, rows in scores.items():
                for id, row in zip(ids, rows, strict=False):
                    for sample, score in enumerate(row):
                        scored = {"em": float(score == 1), "f1": score, "cover_em": float(score > 0.4)}
                        unknown = ("gold_title_recall", "gold_title_opened", "prompt_tokens", "generated_tokens")
                        counts = ("turns", "searches", "accesses", "reads", "invalid_actions")
                        played = Episode(
                            question_id=id, question="?", gold_answers=("x",), sample=sample, status="answered",
                            answer="x", actions=(("answer", "x"),), judge=score if judged else None, **scored,
                            **dict.fromkeys(unknown), **dict.fromkeys(counts, 1),
                        )  # fmt: skip
                        line = {"env": env, "agent": agent, "seconds": 0.5, **played.as_dict()}
                        file.write(json.dumps(line) + "\n")
        return folder

    return call


def compared(one: Path, other: Path, *agents: str) -> dict[str, Comparison]:
    ((a, b),) = pair_up(read_sides(one), read_sides(other), agents)
    return {found.score: found for found in compare(a, b)}


def test_one_episode_per_question_by_hand(write: Write) -> None:
    one = write("one", {"x": [[0.0], [0.5], [0.0], [1.0], [0.0], [1.0]]})
    other = write("other", {"x": [[1.0], [1.0], [1.0], [0.0], [0.2], [1.0]]})
    found = compared(one, other)
    em = found["em"]
    assert (em.questions, em.a, em.b, em.wins, em.losses) == (6, 2 / 6, 4 / 6, 3, 1)
    assert em.difference == pytest.approx(1 / 3)
    assert em.p == pytest.approx(10 / 16), "McNemar: 2 (1 + 4) / 16"
    assert (em.low, em.high) == (pytest.approx(-1 / 3), pytest.approx(5 / 6))
    # Differences 1, .5, 1, -1, .2: of the 32 sign assignments those whose sum lies at 1.7 or further out.
    f1 = found["f1"]
    assert f1.difference == pytest.approx(1.7 / 6) and (f1.wins, f1.losses) == (4, 1)
    assert f1.p == pytest.approx(14 / 32)
    assert "judge" not in found and found["cover_em"].b == pytest.approx(4 / 6)


def test_several_episodes_are_averaged_per_question(write: Write) -> None:
    third = [1.0, 0.0, 0.0]
    one = write("one", {"x": [third, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]}, judged=True, judge="j")
    other = write("other", {"x": [third[::-1], [1.0, 1.0, 0.0], third]}, judged=True, judge="j")
    found = compared(one, other)
    em = found["em"]
    assert (em.questions, em.wins, em.losses) == (3, 1, 1), "the order of the episodes makes no difference"
    assert em.difference == pytest.approx(0.0) and em.p == 1.0
    assert found["judge"].a == em.a == pytest.approx(4 / 9)


def test_the_same_result_differs_in_nothing(write: Write) -> None:
    folder = write("one", {"x": [[0.3], [1.0], [0.0]]})
    for found in compared(folder, folder / "summary.json").values():
        assert (found.difference, found.low, found.high, found.p, found.wins) == (0.0, 0.0, 0.0, 1.0, 0)


def test_two_agents_of_one_result(write: Write) -> None:
    folder = write("one", {"x": [[0.0]] * 5, "y": [[1.0]] * 5})
    found = compared(folder, folder, "x", "y")["em"]
    assert (found.difference, found.low, found.high, found.p, found.wins) == (1.0, 1.0, 1.0, 2 / 32, 5)
    assert len(pair_up(read_sides(folder), read_sides(folder))) == 2, "each with itself, when nobody says otherwise"


@pytest.mark.parametrize(
    "change",
    [
        {"corpus_fingerprint": "other"}, {"retriever": "Dense"}, {"index": "hybrid"}, {"top_k": 3},
        {"questions_fingerprint": "other"}, {"temperature": 0.0}, {"samples": 2, "rows": [[0.0, 1.0]]},
    ],
)  # fmt: skip
def test_other_conditions_are_refused_by_name_unless_forced(
    write: Write, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = change.pop("rows", [[1.0]]) * 4
    one, other = write("one", {"x": [[0.0]] * 4}), write("other", {"x": rows}, **change)
    (name,) = change
    with pytest.raises(SystemExit) as stopped:
        main([str(one), str(other), "--output", str(tmp_path / "c.json")])
    assert stopped.value.code == 2
    refused = capsys.readouterr().err
    assert f"do not compare: {name}: " in refused and f"-> {change[name]} (x in e)" in refused and "--force" in refused
    assert not (tmp_path / "c.json").exists()
    main([str(one), str(other), "--force"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"forced: scores that differ in {name}: " in printed and "4 questions in common" in printed


def test_where_data_lies_and_a_judge_of_one_side_do_not_matter(write: Write) -> None:
    one = write("one", {"x": [[0.0]]}, url="http://one", judge="j", judged=True)
    other = write("other", {"x": [[1.0]]}, url="http://other")
    ((a, b),) = pair_up(read_sides(one), read_sides(other))
    assert condition_differences(a, b) == []
    assert [found.score for found in compare(a, b)] == ["em", "f1", "cover_em"]
    third = write("third", {"x": [[1.0]]}, judge="another", judged=True)
    ((a, b),) = pair_up(read_sides(one), read_sides(third))
    assert condition_differences(a, b) == ["judge: j -> another"]


def test_forced_comparisons_use_the_common_questions(write: Write) -> None:
    one, other = write("one", {"x": [[0.0], [1.0], [1.0]]}), write("other", {"x": [[1.0], [0.0]]}, ids="cz")
    found = compared(one, other)["em"]
    assert (found.questions, found.a, found.b) == (1, 1.0, 1.0)
    with pytest.raises(ConfigError, match="no question in common"):
        compared(one, write("third", {"x": [[1.0]]}, ids="z"))


def test_nothing_to_compare_is_an_error_that_says_what_there_is(write: Write) -> None:
    one, other = write("one", {"x": [[0.0]]}), write("other", {"y": [[0.0]]})
    with pytest.raises(ConfigError, match=r"first result has x in e, the second y in e; name an agent of each"):
        pair_up(read_sides(one), read_sides(other))
    with pytest.raises(ConfigError, match=r"for --agents x z"):
        pair_up(read_sides(one), read_sides(other), ("x", "z"))
    assert len(pair_up(read_sides(one), read_sides(other), ("x", "y"))) == 1
    with pytest.raises(ConfigError, match="x in e, the second x in another"):
        pair_up(read_sides(one), read_sides(write("third", {"x": [[0.0]]}, env="another")))


def test_what_is_no_result_is_named(write: Write, tmp_path: Path) -> None:
    folder = write("one", {"x": [[0.0], [1.0]]})
    with pytest.raises(DataError, match=r"none/summary\.json|none: not the summary\.json"):
        read_sides(tmp_path / "none")
    (tmp_path / "other.json").write_text('{"environments": [{}]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.json: not the summary\.json of an evaluation"):
        read_sides(tmp_path / "other.json")
    stored = (folder / "episodes.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "episodes.jsonl").write_text(stored[0], encoding="utf-8")
    with pytest.raises(DataError, match="has 1 episodes of x in e, and the summary beside it 2"):
        read_sides(folder)
    (folder / "episodes.jsonl").unlink()
    with pytest.raises(DataError, match=r"episodes\.jsonl cannot be read"):
        read_sides(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c"], "name two results, or one"),
        (["a"], "name two results, or one"),
        (["a", "--agents", "x", "x"], "differs in nothing from itself"),
    ],
)
def test_arguments_that_make_no_comparison(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.out + shown.err).replace("│", " ").split())


def test_real_evaluations_from_a_shell(tmp_path: Path) -> None:
    asked = ["--env", "carl/MiniWiki-v0", "--questions", "60", "--samples", "2"]
    for seed in ("0", "1"):
        folder = str(tmp_path / seed)
        evaluate([*asked, "--agents", "oracle", "random", "--seed", seed, "--output-dir", folder])
    script = [executable, str(ROOT / "scripts" / "compare.py")]
    done = run(
        [*script, "0", "1/summary.json", "--output", "both.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "oracle in carl/MiniWiki-v0: 60 questions in common" in done.stdout and "│ EM " in done.stdout
    stored = json.loads((tmp_path / "both.json").read_text("utf-8"))
    assert stored["forced"] == {} and len(stored["comparisons"]) == 2 * 3
    assert stored["comparisons"][0]["p"] == 1.0, "the oracle against itself"
    done = run([*script, "0", "--agents", "random", "oracle"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "random (A) and oracle (B)" in done.stdout
    failed = run([*script, "0", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: 2: not the summary.json")
    heavy = "import sys, scripts.compare; print({'torch', 'transformers', 'mlflow'} & {*sys.modules})"
    assert run([executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
