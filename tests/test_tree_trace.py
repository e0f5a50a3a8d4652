"""Rollout trees as MLflow traces: what a trace says of a known tree, in an SQLite store and through a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.exceptions import MlflowException
from test_mlflow_outage import server, start  # noqa: F401  (a fixture)
from test_viewer import HOSTILE, WORDS, small_tree

from benchmarks.servers import Server
from carl_gym.envs.state import Question
from carl_gym.tracking.backlog import Backlog
from carl_gym.tracking.tree_record import TreeRecord, tree_record
from carl_gym.tracking.tree_trace import trace_id

TAGS = {"algorithm": "carl"}


def record(step: int = 3, **changes: object) -> TreeRecord:
    return tree_record(small_tree(**changes), decode=WORDS.decode, step=step)


def traces(uri: str, run_id: str) -> list[Trace]:
    client = MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_traces(locations=[experiment], run_id=run_id, include_spans=False)
    return [client.get_trace(trace.info.trace_id) for trace in found]


def check(uri: str, run_id: str) -> None:
    """The trace of the small tree, whichever store it is in."""
    (trace,) = traces(uri, run_id)
    assert trace.info.trace_id == trace_id(run_id, 3, 0)
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run_id
    assert trace.info.tags["algorithm"] == "carl" and trace.info.tags["step"] == "3"
    assert trace.info.request_preview == "step 3: Who wrote Dusty Promise?"
    scores = {a.name: a.value for a in trace.info.assessments}
    assert scores == {"gold answers": "Ada Lane; A. Lane", "em": 0.25, "f1": pytest.approx(0.25)}
    by_id = {span.span_id: span for span in trace.data.spans}
    kinds = [span.span_type for span in trace.data.spans]
    assert kinds.count("AGENT") == 3, "the tree, and its two starts"
    assert kinds.count("LLM") == 7, "an action per node that is no root"
    assert kinds.count("RETRIEVER") == 2 and kinds.count("TOOL") == 1
    right = next(span for span in by_id.values() if span.name.endswith("answer: Ada Lane"))
    assert right.name == "A +0.67  answer: Ada Lane"
    expected = {"A": 0.6667, "update": "trained", "h": 0.5, "R": 1.0, "em": 1.0, "trajectory": 0, "end": "answered"}
    assert {name: right.attributes[name] for name in expected} == expected
    assert right.attributes["log_prob"] == -0.5 * right.attributes["tokens"]
    assert right.outputs == "<think>hm</think> <answer> Ada Lane </answer>"
    search = by_id[right.parent_id]
    assert search.name == "dropped  search: Dusty Promise"
    assert {k: search.attributes[k] for k in ("n", "V")} == {"n": 3, "V": 0.3333}
    assert by_id[search.parent_id].span_type == "AGENT" and by_id[search.parent_id].parent_id in by_id
    (found,) = (s for s in by_id.values() if s.span_type == "RETRIEVER" and s.parent_id == search.span_id)
    assert [d["page_content"] for d in found.outputs] == [
        "Doc 1(Title: Dusty Promise (book)) A book by Ada Lane.",
        "Doc 2(Title: Dust) Dust.",
    ]
    usage = search.attributes["mlflow.chat.tokenUsage"]
    assert usage["output_tokens"] == search.attributes["tokens"] == len(WORDS.encode(search.outputs))


def test_a_tree_is_a_trace_of_its_run_and_logged_twice_is_one(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start(uri, tmp_path / "run")
    assert tracker.lacks_trees(3, 1)
    for _ in range(2):
        tracker.log_trees(3, [record()], tags=TAGS)
    check(uri, tracker.run_id)
    again = start(uri, tmp_path / "run", run_id=tracker.run_id)
    assert not again.lacks_trees(3, 1) and again.lacks_trees(3, 2) and again.lacks_trees(4, 1)


def test_a_step_that_is_done_again_replaces_its_own(tmp_path: Path) -> None:
    tracker = start(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run")
    tracker.log_trees(3, [record()], tags=TAGS)
    tracker.log_trees(3, [record(win=0.0)], tags=TAGS)
    (trace,) = traces(tracker.uri, tracker.run_id)
    assert {span.attributes["R"] for span in trace.data.spans if "R" in span.attributes} == {0.0}


def test_a_server_takes_the_same_and_what_it_missed_is_made_up_for(server: Server, tmp_path: Path) -> None:  # noqa: F811
    import signal

    tracker = start(server.url, tmp_path / "run")
    server.signal(signal.SIGKILL)
    with pytest.warns(UserWarning, match="does not take the trees of step 3"):
        tracker.log_trees(3, [record()], tags=TAGS)
    server.ready()
    with pytest.warns(UserWarning, match="is back, and has what it lacked"):
        tracker.finish()
    check(server.url, tracker.run_id)


def test_hostile_texts_are_texts_of_the_trace(tmp_path: Path) -> None:
    tracker = start(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run")
    asked = Question("q-0", " ".join(HOSTILE), ("Ada Lane", HOSTILE[4]))
    tracker.log_trees(3, [record(question=asked, second=HOSTILE[0])], tags=TAGS)
    (trace,) = traces(tracker.uri, tracker.run_id)
    assert "\\x1b[2J" in trace.data.spans[0].inputs["question"] and "<script>" in trace.data.spans[0].inputs["question"]
    assert any(HOSTILE[0] in str(span.outputs) for span in trace.data.spans)


def test_what_a_store_refuses_is_given_up_loudly_and_what_comes_later_is_not_held_up() -> None:
    backlog, made = Backlog("sqlite:///x"), []

    def refused() -> None:
        raise NotImplementedError("no spans here")

    with pytest.warns(UserWarning, match=r"refuses the trees: no spans here. The run goes on without"):
        backlog.add("the trees", refused, optional=True)
    backlog.add("step 1", lambda: made.append(1))
    assert made == [1] and backlog.lacking == ""

    def invalid() -> None:
        raise MlflowException.invalid_parameter_value("too long")

    with pytest.warns(UserWarning, match="does not take step 2"):
        backlog.add("step 2", invalid)
    assert "lacks step 2" in backlog.lacking, "metrics are never given up"
