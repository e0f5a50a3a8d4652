"""A profile: what it says of a real run, what it leaves alone, and what it keeps when there is too much."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from training_runs import config, metrics, run_record, same_training, without_times

from carl_gym.training.cli import main
from carl_gym.training.profile_report import report, trace_events
from carl_gym.training.profiler import Profiler
from carl_gym.training.trainer import Trainer

Event = dict[str, object]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def profiled(tiny_agent_folder: Path, tmp_path_factory: pytest.TempPathFactory, uri: str) -> Trainer:
    """A run of two steps, evaluated and saved at the end."""
    folder = tmp_path_factory.mktemp("runs") / "profiled"
    trainer = Trainer(config(tiny_agent_folder, folder, tracking_uri=uri, steps=2), profile=True)
    list(trainer.run())
    return trainer


def table(text: str) -> list[tuple[int, str, int | None, float, float]]:
    """Depth, phase, calls, seconds and share of every row."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d.]+", cells[2]):
            name = cells[0].lstrip("· ")
            depth = (len(cells[0]) - len(name)) // 2
            calls = int(cells[1].replace(",", "")) if cells[1] else None
            rows.append((depth, name, calls, float(cells[2]), float(cells[3])))
    return rows


def spans(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def read_events(folder: Path) -> list[Event]:
    return json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


def check_nesting(events: Iterable[Event]) -> None:
    """Two spans of a thread lie one in the other, or one after the other; the outer one comes first in the file."""
    open_until: dict[object, list[int]] = {}
    before = -1
    for event in spans(events):
        start, end = event["ts"], event["ts"] + event["dur"]
        assert start >= before
        before = start
        ends = open_until.setdefault(event["tid"], [])
        while ends and ends[-1] <= start:
            ends.pop()
        assert not ends or end <= ends[-1]
        ends.append(end)


# -- a real run ------------------------------------------------------------------------------------


def test_the_rows_of_the_table_add_up(profiled):
    text = (profiled.config.output_dir / "profile.md").read_text(encoding="utf-8")
    rows = table(text)
    whole = float(re.search(r"([\d.]+) s of wall-clock time, 2 training steps", text)[1])
    assert sum(share for depth, *_, share in rows if depth == 0) == pytest.approx(100, abs=0.1 * len(rows))
    assert sum(seconds for depth, *_, seconds, _ in rows if depth == 0) == pytest.approx(whole, abs=0.01 * len(rows))
    for position, (depth, name, _, seconds, _) in enumerate(rows):
        below = list(itertools.takewhile(lambda row, depth=depth: row[0] > depth, rows[position + 1 :]))
        inside = [row[3] for row in below if row[0] == depth + 1]
        if inside:
            assert sum(inside) == pytest.approx(seconds, abs=0.01 * (len(inside) + 1)), name
    assert all(seconds >= 0 for *_, seconds, _ in rows)


def test_every_phase_is_there_and_counted(profiled):
    folder = profiled.config.output_dir
    rows = metrics(folder)
    calls = {phase: total.calls for phase, total in profiled.profiler.totals.items()}
    for name, expected in {
        "rollout": 2,
        "credit and selection": 2,
        "update": 2,
        "sync": 2,
        "evaluation": 4,  # before and after, sampled and greedy
        "logging": 3,
        "checkpoint": 1,
    }.items():
        assert calls["step", name] == expected, name
    generated = sum(row.get("rollout/actions_generated", 0) for row in rows)
    assert calls["step", "rollout", "reward"] == generated
    updates = sum(2 - row["update/skipped"] for row in rows[1:])
    assert calls["step", "update", "packing"] == calls["step", "update", "optimiser"] == updates
    assert calls["step", "update", "forward"] == calls["step", "update", "backward"] >= updates
    assert calls["step", "rollout", "environment"] == calls["step", "rollout", "sample"]
    assert calls["step", "rollout", "environment", "retrieval"] > 0
    for phase in ("prefill", "decode"):
        assert calls["step", "rollout", "sample", phase] >= 1
        assert calls["step", "evaluation", "sample", phase] >= 1
    names = [name for _, name, *_ in table((folder / "profile.md").read_text(encoding="utf-8"))]
    assert {"tree bookkeeping", "rows, loss, gradient norm", "figures and artifacts", "everything else"} <= set(names)


def test_the_profile_agrees_with_the_times_of_the_metrics(profiled):
    rows = metrics(profiled.config.output_dir)[1:]
    for name, *phase in (("rollout",), ("sample", "rollout", "sample"), ("update",), ("sync",)):
        total = profiled.profiler.totals["step", *(phase or [name])]
        assert 0 < total.nanoseconds / 1e9 <= sum(row[f"time/{name}"] for row in rows), name  # it lies inside of these


def test_the_trace_is_made_of_complete_events_that_nest(profiled):
    events = read_events(profiled.config.output_dir)
    assert {event["ph"] for event in events} == {"M", "X"}
    for event in events:
        assert {"ph", "ts", "dur", "pid", "tid", "name"} <= set(event)
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("ts", "dur", "pid", "tid"))
        assert isinstance(event["name"], str) and event["name"]
        assert all(isinstance(value, int | str) for value in event["args"].values())
    assert [e["name"] for e in events if e["ph"] == "M"] == ["process_name", "thread_name"]
    check_nesting(events)
    found = {event["name"] for event in spans(events)}
    assert {"step 0", "step 1", "step 2", "rollout", "sample", "prefill", "decode", "environment", "update"} <= found
    assert {"credit and selection", "forward", "backward", "optimiser", "sync", "evaluation", "checkpoint"} <= found
    samples = [event["args"] for event in spans(events) if event["name"] == "sample"]
    assert all(args["actions"] > 0 and args["prefix_tokens"] > args["actions"] for args in samples)
    steps = [event for event in spans(events) if str(event["name"]).startswith("step ")]
    for name in ("rollout", "update"):
        for part in (event for event in spans(events) if event["name"] == name):
            assert any(s["ts"] <= part["ts"] and part["ts"] + part["dur"] <= s["ts"] + s["dur"] for s in steps)


def test_the_files_are_artifacts_of_the_run(profiled, uri):
    from mlflow import MlflowClient

    record = run_record(profiled.config.output_dir)
    found = {file.path for file in MlflowClient(tracking_uri=uri).list_artifacts(record["run_id"])}
    assert {"profile.md", "trace.json"} <= found


def test_a_run_computes_the_same_with_and_without(profiled, tiny_agent_folder, tmp_path, uri):
    plain = tmp_path / "plain"
    list(Trainer(config(tiny_agent_folder, plain, tracking_uri=uri, steps=2)).run())
    assert without_times(metrics(plain)) == without_times(metrics(profiled.config.output_dir))
    assert same_training(plain, profiled.config.output_dir)
    assert not (plain / "profile.md").exists() and not (plain / "trace.json").exists()


def test_nothing_is_watched_any_more_when_the_run_is_over(profiled):
    for owner, method in (
        (profiled.agent.policy, "sample"),
        (profiled.agent.model.base_model, "forward"),
        (profiled.task, "transition_batch"),
        (profiled.task.retriever, "search"),
        (profiled.learner, "update"),
        (profiled.learner.model, "forward"),
        (profiled.learner.optimizer, "step"),
    ):
        assert method not in vars(owner)


def test_an_asynchronous_run_shows_the_environment_beside_and_when_the_policy_waits_for_it(
    tiny_agent_folder, tmp_path, uri
):
    settings = {"schedule": "async", "steps": 1, "eval_questions": 0, "tracking_uri": uri}
    trainer = Trainer(config(tiny_agent_folder, tmp_path / "run", **settings), profile=True)
    list(trainer.run())
    sample = ("step", "rollout", "sample")
    own, beside = trainer.profiler.totals, trainer.profiler.beside
    for phase in ("prefill", "decode", "exchange", "waiting for the environment"):
        assert own[*sample, phase].calls > 0
    assert beside["environment",].calls >= beside["environment", "retrieval"].calls > 0
    assert ("step", "rollout", "environment") not in own
    rows = table((tmp_path / "run" / "profile.md").read_text(encoding="utf-8").split("In other threads")[0])
    assert sum(share for depth, *_, share in rows if depth == 0) == pytest.approx(100, abs=0.1 * len(rows))
    check_nesting(read_events(tmp_path / "run"))


def test_a_run_that_breaks_off_leaves_its_profile_and_a_resumed_one_that_of_its_own_steps(
    tiny_agent_folder, tmp_path, uri
):
    folder = tmp_path / "run"
    run = Trainer(config(tiny_agent_folder, folder, tracking_uri=uri, eval_questions=0), profile=True).run()
    assert len(list(itertools.islice(run, 3))) == 3
    assert not (folder / "profile.md").exists()
    run.close()
    assert "It shows steps 0, 1, 2." in (folder / "profile.md").read_text(encoding="utf-8")
    for left in (2, 0):  # no step is left to do the second time, so there is nothing to write
        resumed = config(tiny_agent_folder, folder, tracking_uri=uri, eval_questions=0, resume=True)
        assert len(list(Trainer(resumed, profile=True).run())) == left
        text = (folder / "profile.md").read_text(encoding="utf-8")
        assert "2 training steps" in text and "It shows steps 3, 4." in text


def test_the_command_says_where_the_profile_is(tiny_agent_folder, tmp_path, uri, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "run"
    words = ["--agent", tiny_agent_folder, "--output-dir", folder, "--tracking-uri", uri, "--profile", "--steps", 1]
    words += ["--eval-questions", 0, "--questions-per-step", 2, "--forks", 1, "--train-questions", 8, "--device", "cpu"]
    main([str(word) for word in words])
    shown = capsys.readouterr().out
    assert f"profile: {folder / 'profile.md'}; open {folder / 'trace.json'} at https://ui.perfetto.dev" in shown
    check_nesting(read_events(folder))


# -- the profiler ----------------------------------------------------------------------------------


def steps(profiler: Profiler, numbers: Iterable[int], inside: int) -> None:
    """Steps with so many deep spans each, long enough to be seen."""
    for number in numbers:
        with profiler.step(number), profiler.span("rollout"):
            for _ in range(inside):
                with profiler.span("sample"):
                    time.sleep(1e-4)


def test_an_inactive_profiler_does_nothing():
    profiler = Profiler(active=False)
    profiler.start()
    assert profiler.span("one") is profiler.span("two", actions=3)
    with profiler.step(1), profiler.span("rollout"), profiler.span("sample"):
        pass
    assert (profiler.totals, profiler.slices, profiler.steps, profiler.threads) == ({}, {}, 0, [])


def test_a_trace_of_many_steps_keeps_whole_steps_spread_over_the_run():
    profiler = Profiler(limit=200)
    profiler.start()
    steps(profiler, range(5, 105), inside=8)  # ten spans a step with the step's own and the phase's
    assert profiler.totals["step", "rollout", "sample"].calls == 800
    kept = sorted(profiler.slices)
    gaps = {later - earlier for earlier, later in itertools.pairwise(kept)}
    assert kept[0] == 5 and len(gaps) == 1 and kept[-1] + gaps.pop() >= 105
    assert 10 <= len(kept) <= 20
    assert all(len(spans_of_step) == 10 for spans_of_step in profiler.slices.values())
    assert profiler.left_out == 0
    text = report(profiler, 1.0, "title")
    assert f"It shows steps {', '.join(map(str, kept))}." in text


def test_a_step_with_too_many_spans_loses_deep_ones_and_says_so():
    profiler = Profiler(limit=80)
    profiler.start()
    steps(profiler, [1, 2], inside=50)
    for number in (1, 2):
        names = [part.name for part in profiler.slices[number]]
        assert names == [*["sample"] * 10, "rollout", "step"]
    assert profiler.left_out == 80
    assert profiler.totals["step", "rollout", "sample"].calls == 100
    assert "80 short spans of its longest steps are left out; the table counts them" in report(profiler, 1.0, "title")
    check_nesting(trace_events(profiler, "title")["traceEvents"])


def test_spans_too_short_to_see_are_counted_and_not_shown():
    profiler = Profiler()
    profiler.start()
    with profiler.step(1), profiler.span("rollout"):
        for microseconds in (19, 21, 10):
            now = time.perf_counter_ns()
            profiler.add("reward", now - 1000 * microseconds, now)
    assert [part.name for part in profiler.slices[1]] == ["reward", "rollout", "step"]
    assert profiler.totals["step", "rollout", "reward"].calls == 3


def test_other_threads_have_spans_of_their_own():
    profiler = Profiler()
    profiler.start()

    def work() -> None:
        assert not profiler.inside("sample")
        with profiler.span("environment"), profiler.span("retrieval"):
            time.sleep(0.002)

    with profiler.step(1), profiler.span("rollout"), profiler.span("sample"):
        thread = threading.Thread(target=work, name="beside")
        thread.start()
        thread.join()
    assert set(profiler.totals) == {("step",), ("step", "rollout"), ("step", "rollout", "sample")}
    assert set(profiler.beside) == {("environment",), ("environment", "retrieval")}
    events = trace_events(profiler, "title")["traceEvents"]
    assert len({event["tid"] for event in spans(events)}) == 2
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["MainThread", "beside"]
    check_nesting(events)
    own, beside = report(profiler, 0.1, "title").split("In other threads")
    assert sum(share for depth, *_, share in table(own) if depth == 0) == pytest.approx(100, abs=1)
    assert [name for _, name, *_ in table(beside)] == ["environment", "retrieval", "transitions"]


def test_a_span_ends_when_what_is_in_it_fails():
    profiler = Profiler()
    profiler.start()
    with pytest.raises(ZeroDivisionError), profiler.step(1), profiler.span("rollout"):
        _ = 1 / 0
    assert profiler.threads[0].open == []
    assert profiler.totals["step", "rollout"].calls == 1


def test_the_owner_waits_for_the_device_at_both_ends_of_a_span_and_other_threads_do_not():
    waits = []
    profiler = Profiler(synchronize=lambda: waits.append(threading.current_thread()))
    profiler.start()
    with profiler.span("rollout"):
        assert len(waits) == 1
        thread = threading.Thread(target=lambda: profiler.span("environment").__enter__())
        thread.start()
        thread.join()
    assert waits == [threading.current_thread()] * 2
