"""A real vLLM server with a key: nothing of it answers without, and training through it works with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from vllm_toys import CONTEXT, TAGS, gap, requests, save_model

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh installs it on CPUs)")

from benchmarks.servers import Server, agent_server
from carl_gym.agents.vllm_server_policy import VllmServerPolicy
from carl_gym.agents.weight_transfer import DiskTransfer
from carl_gym.api_key import VARIABLE
from carl_gym.envs.protocol import STOP_STRINGS

KEY = "sesame-0123456789"
PATIENCE = 300


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A server whose key is in its environment, and its log."""
    save_model(tmp_path / "model")
    server = agent_server(str(tmp_path / "model"), tmp_path / "log", {"OMP_NUM_THREADS": "1", VARIABLE: KEY})
    try:
        server.ready()
        yield server, tmp_path / "log"
    finally:
        server.signal(signal.SIGKILL)


def test_a_vllm_server_with_a_key_is_closed_and_trains(
    served: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, log = served
    for path in ("/collective_rpc", "/pause", "/resume", "/reset_prefix_cache", "/update_weight_version",
                 "/inference/v1/generate", "/v1/models", "/metrics", "/sleep", "/load_lora_adapter"):  # fmt: skip
        for method in ("GET", "POST"):
            answer = httpx.request(method, server.url + path, json={"method": "carl_gym_load", "args": ["/x"]})
            assert answer.status_code == 401 and VARIABLE in answer.json()["detail"]
    monkeypatch.setenv(VARIABLE, KEY)
    model = save_model(tmp_path / "learner", scale=0.12)
    policy = VllmServerPolicy(
        [server.url], TAGS, STOP_STRINGS, {TAGS.eos_token_id}, context=CONTEXT,
        transfer=DiskTransfer(tmp_path / "weights"), patience=PATIENCE,
    )  # fmt: skip
    policy.sync(dict(model.named_parameters()))
    asked = requests(4, temperature=1.0)
    assert gap(model, asked, policy.sample(asked)) < 1e-4
    policy.close()
    assert KEY not in log.read_text() and KEY.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
