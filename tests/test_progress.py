"""What commands show while they work: on a real terminal, in a notebook, and where there is neither."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from terminal import Terminal
from training_runs import arguments, metrics

from carl_gym import progress
from carl_gym.console import hide_model_bars, show_line
from carl_gym.progress import duration, live_display
from carl_gym.training.cli import main, step_line
from carl_gym.training.config import TrainConfig
from carl_gym.training.display import ASCII, BLOCKS, SPARKS, TrainingDisplay, sparkline

ROOT = Path(__file__).parents[1]

NOISE = r"""
import logging, sys, threading, warnings
from carl_gym.errors import DataError
from carl_gym.training import trainer

library = logging.getLogger("library")
library.addHandler(logging.StreamHandler(sys.stderr))  # bound to the terminal before any display is there
train_step = trainer.Trainer._train_step

def noisy(self, step):
    print(f"printed at step {step} [/bold]")
    warnings.warn(f"warned at step {step} [red]\x1b[2J" + "." * 120)
    library.error("logged at step %d", step)
    sys.stderr.write("10 %\r20 %\rdone at step " + str(step) + "\n")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    sys.stdout.write("begun ")
    if step == 2:
        raise DataError("gone [/red]")
    found = train_step(self, step)
    sys.stdout.write(f"and ended at step {step}\n")
    return found

trainer.Trainer._train_step = noisy
from carl_gym.training.cli import main, step_line
main()
"""


def steps_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step +(\d+)  actions ", text, re.MULTILINE)]


def test_a_run_on_a_terminal_shows_where_it_is_and_leaves_its_lines_whole(tiny_agent_folder: Path, tmp_path: Path):
    script = [sys.executable, str(ROOT / "scripts" / "train_carl.py")]
    shown = Terminal([*script, *arguments(tiny_agent_folder, tmp_path / "run", steps=3)], ROOT)
    assert shown.code == 0, shown.text
    rows = metrics(tmp_path / "run")
    during = shown.screen(lambda screen: "now " in screen and "2 of 3" in screen)
    assert "carl-lite in " in during and "67%" in during and "left" in during
    assert f"{int(rows[2]['actions_generated']):,} generated" in during
    for name in ("reward", "EM", "held-out EM", "tokens/s", "gap"):
        assert re.search(rf"│ {name} ", during), name
    phases = {phase for screen in shown.screens for phase in re.findall(r"│ now +([a-z ]+),", screen)}
    assert "rollout" in phases and len(phases) >= 2
    assert steps_of(shown.text) == [0, 1, 2, 3], "the lines that files get, above the display"
    assert "│ now" not in shown.text and "Held-out results" in shown.text, "at the end the display is gone"
    assert shown.raw[-1].count(b"\x1b[?25l") <= b"".join(shown.raw).count(b"\x1b[?25h"), "the cursor is back"


def test_whatever_is_printed_meanwhile_is_neither_lost_nor_torn(tiny_agent_folder: Path, tmp_path: Path):
    program = tmp_path / "noisy.py"
    program.write_text(NOISE, encoding="utf-8")
    words = arguments(tiny_agent_folder, tmp_path / "run", steps=2, eval_questions=0)
    shown = Terminal([sys.executable, str(program), *words], ROOT, {"PYTHONPATH": str(ROOT)})
    assert shown.code == 2, shown.text
    assert any("│ now" in screen for screen in shown.screens)
    for step in (1, 2):
        for line in (f"printed at step {step} [/bold]", f"logged at step {step}", f"done at step {step}"):
            assert shown.lines.count(line) == 1, (line, shown.text)
        assert shown.text.replace("\n", "").count(f"warning: warned at step {step} [red]\\x1b[2J{'.' * 120}") == 1
    assert shown.lines.count("ZeroDivisionError: division by zero") == 2 and "Traceback (most recent" in shown.text
    assert shown.lines.count("begun and ended at step 1") == 1 and steps_of(shown.text) == [0, 1]
    assert [line for line in shown.lines if line][-2:] == ["begun", "error: gone [/red]"], "after the display"
    assert "│" not in shown.text, "no rest of the display anywhere"


def test_quiet_leaves_the_result_alone(tiny_agent_folder: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    main([*arguments(tiny_agent_folder, tmp_path / "run", steps=1), "--quiet"])
    shown = capsys.readouterr().out
    assert "Held-out results" in shown and "checkpoint, metrics and figures" in shown
    assert not steps_of(shown) and "trains agent" not in shown
    assert "quiet" not in json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))


def test_a_notebook_gets_lines(tiny_agent_folder: Path, tmp_path: Path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    words = arguments(tiny_agent_folder, tmp_path / "run", steps=1)
    code = f"from carl_gym.training.cli import main\nmain({words!r})"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    outputs = book.cells[0].outputs
    text = "\n".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs)
    assert steps_of(text) == [0, 1] and "Held-out results" in text
    assert "for Jupyter support" not in text and "│ now" not in text, "what rich says when it would need a widget"


# -- the parts -------------------------------------------------------------------------------------


def display(history=(), phase=None, **options: object) -> TrainingDisplay:
    return TrainingDisplay(TrainConfig(**options), history, lambda: phase)


def drawn(shown: TrainingDisplay, width: int = 100, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, force_terminal=True, color_system=None).print(shown)
    out.seek(0)
    return out.read()


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "actions_generated": 100.0 * step, "actions_trained": 40.0 * step, **more}


def test_before_the_first_step_there_is_a_bar_and_a_phase():
    text = drawn(display(phase=("evaluation", 62.0), steps=5))
    assert "0 of 5" in text and "evaluation, 1 min 2 s" in text and "left" not in text and "reward" not in text


def test_time_that_is_left_counts_from_the_first_step_of_this_process(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("carl_gym.training.display.time.monotonic", lambda: now[0])
    new, resumed = display(steps=10), display([row(0), row(4)], steps=10)
    now[0] += 500  # evaluation before training
    new.update(row(0))
    assert new.left() is None
    now[0] += 20
    new.update(row(2))
    resumed.update(row(6))
    assert new.left() == pytest.approx(80) and resumed.left() == pytest.approx(520 * 2)
    now[0] += 5
    assert new.left() == pytest.approx(75)
    budget = display(steps=1000, max_actions=400)
    budget.update(row(1))
    assert budget.done == 0.25 and "1 of" not in drawn(budget), "the budget ends it, not the number of steps"


def test_names_are_shown_as_they_are_on_any_terminal(tmp_path: Path):
    shown = display([row(1, **{"rollout/reward": 0.5, "rollout/em": 0.5})], output_dir=Path("[/red]\x1b[2J"))
    for width in (20, 40, 300):
        assert "\x1b[2J" not in drawn(shown, width) and max(map(len, drawn(shown, width).splitlines())) <= width
    assert "[/red]\\x1b[2J" in drawn(shown)
    assert BLOCKS[4] in drawn(shown) and ASCII[4] in drawn(shown, encoding="ascii")


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([3.0]) == sparkline([5.0]) and len(set(sparkline([2.0, 2.0]))) == 1
    long = sparkline(range(1000), ASCII)
    assert len(long) == SPARKS and (long[0], long[-1]) == (ASCII[0], ASCII[-1])


def test_streams_and_handlers_are_put_back_and_stay_usable(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger("somebody.else").addHandler(handler)
    console = Console(file=screen, force_terminal=True, width=60)
    with live_display(console, lambda: "at the foot"):
        inside = sys.stderr
        assert handler.stream is inside is not screen
        inside.write("half a li")
    assert sys.stderr is screen and handler.stream is screen
    inside.write("later\n")
    assert "half a li" in screen.getvalue() and screen.getvalue().endswith("later\n")
    logging.getLogger("somebody.else").removeHandler(handler)


def test_when_a_display_ends_no_thread_holds_what_it_has_drawn(monkeypatch):
    """Else that thread may take the model down while Python exits: an abort in place of exit code 2."""
    monkeypatch.setattr(progress, "REFRESH", 100.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    drawing = threading.Event()

    def slow() -> str:
        if threading.current_thread() is not threading.main_thread():
            drawing.set()
            time.sleep(0.2)
        return "at the foot"

    before = set(threading.enumerate())
    with live_display(console, slow):
        assert drawing.wait(60)
    assert set(threading.enumerate()) <= before
    with progress.progress(console, "passages") as report:
        report("indexing", 1, 2)
        assert "display" in {thread.name for thread in threading.enumerate()}
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_where_nothing_can_be_drawn_jobs_have_lines(options, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    out = io.StringIO()
    with progress.progress(Console(file=out, width=20, **options), "passages") as report:
        report("indexing [x]", 50, 200)
        report("indexing [x]", 200, 200)
        report("counting", 7, 0)
    first, last, open_end = out.getvalue().splitlines()
    assert first == "indexing [x]: 50 of 200 (25.0%)" and open_end == "counting: 7"
    assert last == "indexing [x]: 200 of 200 (100.0%)"


def test_on_a_terminal_jobs_have_bars_and_lines_come_above():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with progress.progress(console, "passages") as report:
        report("indexing [x]", 50, 200)
        show_line(console, "in between")
        report("indexing [x]", 200, 200)
    assert "indexing [x]" in out.getvalue() and "200/200" in out.getvalue() and "in between" in out.getvalue()


def test_quiet_jobs_show_nothing():
    out = io.StringIO()
    with progress.progress(Console(file=out, force_terminal=True), "passages", quiet=True) as report:
        report("indexing", 1, 1)
    assert out.getvalue() == ""


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59.6, 61)] == ["0 s", "1 min 0 s", "1 min 1 s"]
    assert [duration(s) for s in (3600, 7260)] == ["1 h 0 min", "2 h 1 min"]


def test_a_step_that_was_evaluated_takes_two_lines_that_fit():
    evaluated = {"step": 0, "actions_generated": 0, "eval/sampled_em": 0.25, "eval/greedy_em": 0.5}
    assert step_line(evaluated) == "step    0  actions       0  held-out EM 0.250 sampled, 0.500 greedy"
    rollout = {"em": 0.5, "reward": 0.4, "actions_trained": 1234, "action_entropy": 0.1, "actions_generated": 4321}
    times = {"time/rollout": 1.0, "time/update": 1.0}
    step, evaluation = step_line(evaluated | times | {f"rollout/{k}": v for k, v in rollout.items()}).splitlines()
    assert step.endswith("2,160 actions/s") and len(step) <= 100
    assert evaluation.strip() == "held-out EM 0.250 sampled, 0.500 greedy"


def test_downloads_keep_their_bars_and_weights_have_none(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    try:
        for quiet in (True, False):
            hide_model_bars(quiet=quiet)
            assert are_progress_bars_disabled() == quiet and not transformers_logging.is_progress_bar_enabled()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        disable_progress_bars()
        hide_model_bars()
        assert are_progress_bars_disabled(), "what the environment says has priority"
    finally:
        monkeypatch.undo()
        transformers_logging.enable_progress_bar()
        enable_progress_bars()
