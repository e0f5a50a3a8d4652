"""How the learner's weights get to vLLM servers: through a file that all can read, or by NCCL between GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from carl_gym.agents import vllm_engine
from carl_gym.errors import PolicyError

Step = tuple[str, Mapping[str, Any]]
"""A path of the server's HTTP interface, and what to post there."""


class WeightTransfer(Protocol):
    """Publishes weights once per version; servers that are behind fetch the latest."""

    def publish(self, weights: Mapping[str, torch.Tensor], label: str) -> None:
        """Make these the current weights."""
        ...

    async def steps(self, url: str, label: str) -> Sequence[Step]:
        """What to post to a paused server, in order, so that it has the current weights; may hand them over itself."""
        ...


class DiskTransfer:
    """A safetensors file in a folder that the learner can write and every server can read. Works anywhere.

    Args:
        folder: the same path on all machines; without one, a temporary folder of this machine.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="carl-gym-weights-")  # goes when this object goes
            folder = Path(self._temporary.name)
        self.folder = folder.absolute()
        self._kept: list[Path] = []

    def publish(self, weights: Mapping[str, torch.Tensor], label: str) -> None:
        """Write the file; the one before the last is removed. Raises PolicyError when it cannot be written."""
        path = self._path(label)
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous().cpu() for name, weight in weights.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors puts a full disk
            with contextlib.suppress(OSError):
                partial.unlink()
            raise PolicyError(
                f"the weights for the servers cannot be written to {path} ({error}); make room there, or name a folder "
                "on another disk with --weights-dir"
            ) from error
        self._kept.append(path)
        for old in self._kept[:-2]:
            old.unlink(missing_ok=True)
        del self._kept[:-2]

    async def steps(self, url: str, label: str) -> Sequence[Step]:
        """One call that has every worker read the file."""
        return [(vllm_engine.RPC, {"method": "carl_gym_load", "args": [str(self._path(label))]})]

    def _path(self, label: str) -> Path:
        return self.folder / f"weights-{label}.safetensors"


class NcclTransfer:
    """vLLM's own NCCL transfer: the learner's GPU broadcasts to a server's, one group per server.

    Servers need `--weight-transfer-config '{"backend": "nccl"}'`. Written from vLLM's documentation and sources; not
    run on any hardware yet.

    Args:
        model: the learner's, on its GPU.
        address: of the learner's machine, as the servers reach it.
        first_port: a free port for the first server's group; the next ones take the ports after it.
    """

    def __init__(self, model: torch.nn.Module, address: str, first_port: int) -> None:
        if not torch.cuda.is_available():
            raise PolicyError("NCCL moves weights between GPUs, and this machine has none; use a DiskTransfer")
        self.model, self.address, self.first_port = model, address, first_port
        self._ports: dict[str, int] = {}

    def publish(self, weights: Mapping[str, torch.Tensor], label: str) -> None:
        """Nothing to do: each server is sent the model's parameters when its turn comes."""

    async def steps(self, url: str, label: str) -> Sequence[Step]:
        """Send the parameters. A new group each time: a server that was restarted has lost the old one."""
        port = self._ports.setdefault(url, self.first_port + len(self._ports))
        await asyncio.to_thread(vllm_engine.send_by_nccl, self.model, url, self.address, port)
        return []
