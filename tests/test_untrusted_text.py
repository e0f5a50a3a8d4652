"""What passages, questions, models, servers and cards write reaches terminals, pages and figures as text only."""

from __future__ import annotations

import html
import io
import json
import logging
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from fastapi import FastAPI, Response
from model_toys import random_model, tag_tokenizer
from rich.console import Console

import carl_gym
from carl_gym.agents.chat_client import ChatClient, OpenAISettings
from carl_gym.agents.policy import Completion
from carl_gym.console import run_command, show_line, show_warnings
from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.state import EnvState, ParsedAction, Question, Turn
from carl_gym.envs.wrappers import RecordTranscript
from carl_gym.errors import ConfigError, DataError, PolicyError, RetrievalError
from carl_gym.evaluation import criticality_report
from carl_gym.evaluation.report import markdown, overview_table, result_table
from carl_gym.harmless import in_markdown, visible
from carl_gym.retrieval.remote import remote_corpus
from carl_gym.retrieval.server import serving
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.tracking.curves import learning_curve
from carl_gym.tracking.style import figure
from carl_gym.tracking.tree_figure import draw_tree
from carl_gym.training.cli import main as train
from scripts import compare, evaluate

EVIL = (
    "\x1b[2J\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\ \x1b]0;title\x07 \x9b31m \rover\x08\x08 "
    "\u202egnorw\u2066 [bold red]rich[/] [/bold] [link=http://evil.example]x[/link] :skull: \x7f"
)
"""What terminals and rich obey."""
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)> [a](javascript:alert(1)) ![](http://evil.example) `|`"
MATH = [r"$\frac{1}{0$", "$100 and $200", r"$\undefined$", "$", r"\input{/etc/passwd}", "a_$_{b}^^", "$$x$$"]


def obeyed(text: str) -> list[str]:
    """The characters in it that a terminal would obey."""
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return [c for c in text if (unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t") or c in bidi]


@pytest.fixture
def hostile_files(tmp_path: Path) -> list[str]:
    """Arguments for carl/SearchQA-v0: hostile texts wherever data can have some."""
    question = {"id": EVIL, "question": f"Who? {EVIL}", "answers": [EVIL], "type": EVIL, "supporting_titles": [EVIL]}
    plain = {"id": "plain", "question": "Who?", "answers": ["x"], "type": "plain", "supporting_titles": ["x"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n" + json.dumps(plain) + "\n")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": EVIL, "title": EVIL, "text": f"Who {EVIL}"}) + "\n")
    return [f"questions={tmp_path / 'questions.jsonl'}", f"corpus={tmp_path / 'corpus.jsonl'}"]


# --- terminals --------------------------------------------------------------------------------------------------------


def test_rendered_episodes_obey_nothing(hostile_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = dict(item.split("=", 1) for item in hostile_files)
    task = carl_gym.make_task("carl/SearchQA-v0", index="miniwiki-bm25", **arguments)
    env = SearchEnv(task, render_mode="human")
    env.reset(options={"question_id": EVIL})
    for action in ("<search>who</search>", f"<access>{EVIL}</access>", f"hm {EVIL}", f"<answer>{EVIL}</answer>"):
        env.step(action)
    printed = capsys.readouterr().out
    assert "\\x1b]8;;http://evil.example" in printed and "[bold red]rich" in printed
    assert obeyed(printed) == []


def test_recorded_transcripts_are_harmless_to_look_at(hostile_files: list[str], tmp_path: Path) -> None:
    """`cat` of the file shows JSON escapes."""
    arguments = dict(item.split("=", 1) for item in hostile_files)
    env = RecordTranscript(gym_env(**arguments), tmp_path / "transcript.jsonl")
    env.reset(options={"question_id": EVIL})
    env.step(f"<search>{EVIL}</search>")
    env.close()
    text = (tmp_path / "transcript.jsonl").read_text()
    assert text.isascii() and [c for c in obeyed(text) if c != "\x7f"] == []
    assert EVIL in json.loads(text.splitlines()[1])["action"]


def gym_env(**arguments: str) -> SearchEnv:
    return SearchEnv(carl_gym.make_task("carl/SearchQA-v0", index="miniwiki-bm25", **arguments))


def test_evaluations_print_and_write_nothing_that_is_obeyed(
    hostile_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--envs", "carl/SearchQA-v0", "--env-args", *hostile_files, "index=miniwiki-bm25"]
    for folder in ("one", "two"):
        evaluate.main(["--agents", "oracle", "heuristic", *options, "--output-dir", str(tmp_path / folder)])
    printed = capsys.readouterr()
    assert "rich[/]" in printed.out.replace("\n", "") and obeyed(printed.out + printed.err) == []
    page = (tmp_path / "one" / "summary.md").read_text()
    assert obeyed(page) == [] and "](javascript" not in page
    # A result from a stranger, which compare.py shows.
    summary = tmp_path / "two" / "summary.json"
    content = json.loads(summary.read_text())
    content["environments"][0]["setting"]["retriever"] = EVIL
    summary.write_text(json.dumps(content))
    results = [str(tmp_path / folder / "summary.json") for folder in ("one", "two")]
    with pytest.raises(SystemExit, match="2"):
        compare.main(results)
    compare.main([*results, "--force"])
    printed = capsys.readouterr()
    assert "these scores do not compare" in printed.err and obeyed(printed.out + printed.err) == []


def test_training_prints_nothing_that_is_obeyed(
    hostile_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, agent = tag_tokenizer(), tmp_path / "agent"
    random_model("llama", len(tokenizer), context=2048).save_pretrained(agent)
    tokenizer.save_pretrained(agent)
    card = 'id = "c"\ndescription = ""\nmodel = "."\nprompt = "{observation}"\nmax_tokens = 8\n'
    (agent / "agent.toml").write_text(card)
    data = ["--env-args", *hostile_files, "index=miniwiki-bm25", "turns=2"]
    train(
        ["--agent", str(agent), "--env", "carl/SearchQA-v0", *data, "--output-dir", str(tmp_path / "run"),
         "--steps", "1", "--questions-per-step", "1", "--minibatches", "1", "--eval-questions", "1", "--device", "cpu",
         "--train-questions", "1", "--threads", "1", "--algorithm", "carl-lite"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert "step    1" in printed.out and obeyed(printed.out) == [] and "\x1b" not in printed.err
    assert list((tmp_path / "run").rglob("rollout_tree.svg"))


def test_tables_show_markup_as_text() -> None:
    summary = hostile_summary()
    screen = io.StringIO()
    console = Console(file=screen, width=400)
    for table in (result_table(summary["environments"][0], summary), overview_table(summary)):
        console.print(table)
    shown = screen.getvalue()
    assert shown.count("[bold red]rich[/]") >= 4 and obeyed(shown) == []


def hostile_summary() -> dict:
    scores = ("em", "em_low", "em_high", "f1", "f1_low", "f1_high", "cover_em", "cover_em_low", "cover_em_high")
    others = ("judge", "judge_low", "judge_high", "turns", "searches", "accesses", "reads", "invalid",
              "gold_title_recall", "gold_title_opened", "answered", "prompt_tokens", "generated_tokens",
              "cost_per_question", "seconds", "pass_at_k", "pass_at_k_low", "pass_at_k_high")  # fmt: skip
    by = {"type": {text: {"questions": 1, "em": 0.5, "f1": 0.5} for text in (EVIL, HTML)}}
    result = {"agent": f"{EVIL} {HTML}", "samples": 1, "by": by}
    result |= dict.fromkeys(scores, 0.5) | dict.fromkeys(others)
    setting = {"source": f"{EVIL} {HTML}", "retriever": HTML, "index": EVIL, "top_k": 3, "corpus_fingerprint": "f",
               "corpus_passages": 1, "questions": 1}  # fmt: skip
    one = {"env": f"{EVIL} {HTML}", "setting": setting, "gold_recall_at_10": None, "results": [result]}
    return {"temperature": 1.0, "samples": 1, "environments": [one, one | {"env": "other"}]}


def test_errors_and_warnings_obey_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fail() -> None:
        raise DataError(f"x {EVIL}")

    with pytest.raises(SystemExit, match="2"):
        run_command(fail)
    said = capsys.readouterr().err
    assert said.startswith("error: x \\x1b[2J") and "[bold red]rich[/]" in said and obeyed(said) == []
    # Without our command lines Python itself prints the message.
    assert obeyed(str(ConfigError(f"a\n{EVIL}"))) == [] and obeyed(f"{PolicyError(EVIL)}") == []
    screen = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show_warnings(Console(file=screen, width=400))
        warnings.warn(f"y {EVIL}", stacklevel=1)
    show_line(Console(file=screen), f"z {EVIL}")
    assert screen.getvalue().count("[bold red]rich[/]") == 2 and obeyed(screen.getvalue()) == []


def test_a_card_from_a_stranger_prints_nothing_that_is_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.toml"
    card.write_text(f'id = {json.dumps(EVIL)}\ndescription = ""\nreward = "nope"\n')
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--agents", "oracle", "--envs", str(card)])
    said = capsys.readouterr().err
    assert said and obeyed(said) == []


@pytest.fixture
def rude() -> Iterator[str]:
    """A server that answers everything with an error that a terminal would obey."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def any_path(path: str) -> Response:
        body = EVIL if "chat" in path else json.dumps({"detail": EVIL})
        return Response(body.encode(), status_code=503 if "info" in path or "chat" in path else 500)

    with serving(app) as url:
        yield url


def test_what_servers_say_obeys_nothing(rude: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with pytest.raises(RetrievalError, match="bold red") as refused:
            remote_corpus(rude, retries=1, backoff=0.0)
        assert obeyed(str(refused.value)) == []
        client = ChatClient(OpenAISettings("m", f"{rude}/v1", retries=1, backoff=0.0))

        async def ask(_: int) -> object:
            return await client.ask({"messages": []}, 0, 1, lambda choice: choice)

        with pytest.raises(PolicyError, match="bold red") as failed:
            client.map(ask, [0])
        client.close()
    assert obeyed(str(failed.value)) == []
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("carl_gym")]
    assert len(logged) == 2 and obeyed("".join(logged)) == []


# --- pages ------------------------------------------------------------------------------------------------------------


def live(page: str) -> list[str]:
    """What of a page of Markdown would be HTML, a link or a picture."""
    return re.findall(r"<\w+|(?<!\\)\]\(|(?<!\\)!\[", page)


def test_pages_of_results_hold_text_only() -> None:
    page = markdown(hostile_summary())
    assert "alert(1)" in page and live(page) == [] and obeyed(page) == []
    rows = [line for line in page.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
    assert cells == {3}  # no cell of another width: two columns each


def test_pages_of_criticality_studies_hold_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criticality_report, "grids", lambda summary: ())
    page = criticality_report.markdown({}, {"agent": HTML, "source": EVIL})
    assert "alert(1)" in page and live(page) == [] and obeyed(page) == []


def test_escaped_markdown_reads_as_it_was_written() -> None:
    shown = html.unescape(re.sub(r"\\([\\`\[\]|])", r"\1", in_markdown(HTML)))
    assert shown == HTML and in_markdown("carl/HotpotQA-v0, top 5 (bm25)") == "carl/HotpotQA-v0, top 5 (bm25)"
    assert visible(EVIL) == visible(visible(EVIL))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usetex", [False, True])
def test_figures_take_dollars_and_markup_as_text(tmp_path: Path, usetex: bool) -> None:
    """Also where the user's matplotlibrc has LaTeX on: a question would be a program for it."""
    with matplotlib.rc_context({"text.usetex": usetex, "text.parse_math": True}):
        for number, text in enumerate([*MATH, HTML]):
            with figure(tmp_path / f"f{number}", 3, 2) as canvas:
                axes = canvas.add_subplot()
                axes.plot([0, 1], [0, 1], label=text)
                axes.set(title=text, xlabel=text)
                axes.legend()
                canvas.suptitle(text)
            shown = svg_texts(tmp_path / f"f{number}.svg")
            assert shown.count(text) == 4


def hostile_tree(text: str) -> RolloutTree:
    """A question, a search and an answer with this text."""
    tree = RolloutTree(Question("q", f"Who? {text}", (text,)), 0)
    at, turns = tree.add_root(EnvState("q"), (1,)), ()
    for kind in ("search", "answer"):
        turns = (*turns, Turn(ParsedAction(kind, text)))  # type: ignore[arg-type]
        state, ends = EnvState("q", turns, "answered" if kind == "answer" else "running"), kind == "answer"
        at = tree.add_child(
            at, Completion((7,), (-0.1,), text, "stop"), state, () if ends else (8,), 1.0, ends, False, 0
        )
    return tree


def test_curves_and_trees_of_hostile_names_are_drawn(tmp_path: Path) -> None:
    rows = [{"actions_generated": 0.0, "eval/sampled_em": 0.1}, {"actions_generated": 9.0, "eval/sampled_em": 0.2}]
    learning_curve({HTML: rows, MATH[0]: rows}, tmp_path / "curve")
    assert {HTML, MATH[0]} <= set(svg_texts(tmp_path / "curve.svg"))
    for number, text in enumerate([*MATH, HTML, EVIL]):
        draw_tree(hostile_tree(text), None, None, tmp_path / f"tree{number}")
        drawn = (tmp_path / f"tree{number}.svg").read_text(encoding="utf-8")
        assert "<script" not in drawn and "<img" not in drawn and obeyed(drawn) == []
        assert svg_texts(tmp_path / f"tree{number}.svg")


def svg_texts(path: Path) -> list[str]:
    """The texts of an SVG file, which is thereby well-formed."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]
