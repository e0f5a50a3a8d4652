"""Episodes against a real `vllm serve` on the CPU, with the tiny agent that the package carries as a chat model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from carl_gym.agents.openai_policy import openai_agent
from carl_gym.agents.policy import Policy
from carl_gym.envs.registration import make_task
from carl_gym.envs.task import SearchTask
from carl_gym.evaluation.episodes import Episode, play
from carl_gym.rollouts.collector import Transcript
from scripts.evaluate import main as evaluate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

TINY = Path(__file__).parents[1] / "agents" / "tiny"
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "assistant" %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}
{%- elif message.role != "system" %}
{{- ("\n" if loop.index > 2 else "Question: ") + message.content + "\n" }}
{%- endif %}{% endfor %}"""
"""Writes what agents/tiny/agent.toml says, so that the model reads what it was trained on."""

CARD = """\
id = "{format}"
description = "the tiny agent behind a server"
model = "toy"
backend = "openai"
urls = ["{url}"]
transcript = "chat"
tool_format = "{format}"
max_tokens = 40
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server for the tiny agent."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(TINY, folder / "toy")
    (folder / "toy" / "chat_template.jinja").write_text(TEMPLATE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "toy"), "--served-model-name", "toy",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1536", "--enforce-eager",
        "--max-num-seqs", "8", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")


def episodes(task: SearchTask, policy: Policy, transcript: Transcript, temperature: float) -> list[Episode]:
    (found,) = play(task, policy, transcript, list(task.questions.values()), temperature=temperature)
    return found


def test_the_evaluation_script_plays_the_agents_own_episodes(server: str, tmp_path: Path) -> None:
    from carl_gym.agents.agent import load_agent

    for kind in ("tags", "json"):
        (tmp_path / f"{kind}.toml").write_text(CARD.format(format=kind, url=server))
    agents = [str(tmp_path / f"{kind}.toml") for kind in ("tags", "json")]
    options = ["--env", "carl/MiniWiki-v0", "--questions", "12", "--temperature", "0"]
    evaluate(["--agents", *agents, *options, "--output-dir", str(tmp_path / "out")])
    (environment,) = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["environments"]
    tags, tools = environment["results"]
    assert tags["em"] >= 0.5 and tags["invalid"] == 0.0
    assert tools["searches"] > 0, "offered functions, it writes tags, and goes on writing as nothing stops it"

    lines = (tmp_path / "out" / "episodes.jsonl").read_text("utf-8").splitlines()
    served = {e["question_id"]: e["actions"] for e in map(json.loads, lines) if e["agent"] == agents[0]}
    task, agent = make_task("carl/MiniWiki-v0", split="test", questions=12), load_agent(str(TINY), device="cpu")
    own = {e.question_id: [list(a) for a in e.actions] for e in episodes(task, agent.policy, agent.transcript, 0.0)}
    assert served.keys() == own.keys()
    same = sum(served[id] == own[id] for id in own)
    assert same >= 11, "the same model, greedy; but what it wrote is tokenized anew, which may change a token"


def test_tools_with_guided_calls(server: str) -> None:
    task = make_task("carl/MiniWiki-v0", split="test", questions=4)
    found, usage = guided(server, task, task.tools)
    kinds = [kind for episode in found for kind, _ in episode.actions]
    assert kinds.count("invalid") < len(kinds) / 2 and {"search", "access", "answer"} & set(kinds)
    assert usage.retries == 0 and usage.requests == len(kinds)
    assert usage.prompt_tokens == sum(episode.prompt_tokens or 0 for episode in found) > 0
    assert usage.completion_tokens == sum(episode.generated_tokens or 0 for episode in found) > 0


def test_a_full_context_ends_the_episode(server: str) -> None:
    task = make_task("carl/MiniWiki-v0", split="test", questions=2, turns=60)
    found, usage = guided(server, task, task.tools[:1])  # search alone: no answer ends it
    assert [episode.status for episode in found] == ["out_of_context"] * 2
    assert all(1 < episode.turns < 60 for episode in found) and usage.retries == 0


def guided(server: str, task: SearchTask, tools: list[dict[str, object]]) -> tuple[list[Episode], Any]:
    """Episodes in which the server lets the model write nothing but valid tool calls.

    The model knows no JSON: alone it would write blanks where they may stand, tags, and strings without an end.
    """
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(TINY).get_vocab()
    unwanted = re.compile(r"[\u0120\u010a\u0109\u010d]+|</?\w+>")  # byte-level BPE's blank, line feed, tab and return
    bias = {str(id): -100.0 for token, id in vocabulary.items() if unwanted.fullmatch(token)}
    more = {"tool_choice": "required", "logit_bias": bias | {str(vocabulary['"']): 5.0}}
    policy, transcript = openai_agent("toy", tools, base_url=server, max_tokens=100, strict=True, extra_body=more)
    with policy:
        return episodes(task, policy, transcript, 1.0), policy.usage
