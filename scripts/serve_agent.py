"""Serve an agent's model with vLLM, for training and evaluation with `--backend vllm-server --urls ...`.

    python scripts/serve_agent.py tiny --port 8001
    python scripts/serve_agent.py Qwen/Qwen2.5-3B-Instruct --dtype bfloat16 --tensor-parallel-size 2

Runs `vllm serve` with what carl-gym needs: processed log-probs, prefix caching, token ids in and out, and workers that
take new weights. Options that are not listed go to `vllm serve` as they are. Whoever reaches the server can change its
weights, so it listens on loopback; on other addresses it wants an API key (docs/security.md).
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from carl_gym.agents.card import resolve
from carl_gym.api_key import VARIABLE, is_loopback, read_api_key
from carl_gym.console import run_command
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.model_files import brings_code


@dataclass(frozen=True)
class Options:
    """Serve an agent's model with vLLM."""

    agent: Annotated[str, tyro.conf.Positional]
    """Agent card, model folder or hub id."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs an API key."""
    port: int = 8000
    """Port to listen on."""
    api_key_file: Path | None = None
    """File with the key that clients must send; by default it is in the variable CARL_GYM_API_KEY, if there is one."""
    dtype: Literal["float32", "bfloat16", "auto"] | None = None
    """Of the weights; the card's by default."""
    context: int | None = None
    """Longest prefix and action together, in tokens; the card's, or else the model's, by default."""
    dry_run: bool = False
    """Print the command and stop."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536 or (self.context is not None and self.context < 1):
            raise ConfigError(f"--port {self.port} or --context {self.context} is out of range")


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: serve(*tyro.cli(Options, args=arguments, return_unknown_args=True)))


def serve(options: Options, others: Sequence[str]) -> None:
    """Become `vllm serve`."""
    from carl_gym.agents import vllm_engine  # --help should not wait for torch

    check_others(others)
    key = read_api_key(options.api_key_file)
    if not (key or is_loopback(options.host)):
        raise ConfigError(
            f"--host {options.host} without a key: whoever reaches the server could change its weights; set {VARIABLE} "
            "here and at the clients, or pass --api-key-file"
        )
    card, model = resolve(options.agent)
    if reason := brings_code(model):
        raise PolicyError(f"agent {options.agent!r}: {reason}")
    command = vllm_engine.serve_arguments(
        model,
        dtype=options.dtype or card.dtype,
        context=options.context or card.context or None,
        port=options.port,
        cpu=vllm_engine.runs_on_cpu(),
        host=options.host,
        guarded=bool(key),
    )
    command += others
    environment = " ".join(f"{name}={value}" for name, value in vllm_engine.SERVE_ENVIRONMENT.items())
    print(environment, shlex.join(command), flush=True)
    if not options.dry_run:
        vllm_engine.require_vllm()
        program = Path(sys.executable).with_name(command[0])
        if not program.is_file():
            raise PolicyError(f"the program vllm is not at {program}: install vLLM into this Python's environment")
        os.execve(program, command, os.environ | vllm_engine.SERVE_ENVIRONMENT | ({VARIABLE: key} if key else {}))


def check_others(others: Sequence[str]) -> None:
    """Raises ConfigError on options of `vllm serve` that would undo what this script takes care of."""
    for option in others:
        name = option.partition("=")[0].replace("_", "-")
        if name == "--api-key":
            raise ConfigError(
                f"{name} shows the key to everybody who runs ps, and vLLM does not ask for it where weights are "
                f"changed; set {VARIABLE}, or pass --api-key-file"
            )
        if name == "--trust-remote-code":
            raise ConfigError(f"{name}: code that a model brings is never run (docs/security.md)")


if __name__ == "__main__":
    main(sys.argv[1:])
