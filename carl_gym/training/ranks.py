"""The processes that train one run together: which one this is, and what they tell each other.

Started by `accelerate launch` or `torchrun`; a process that neither started is alone, and everything here costs it
nothing. Objects and numbers go through accelerate, so that the backend (gloo, NCCL) is its affair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from carl_gym.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run.

    Attributes:
        index: of this process, from 0.
        count: how many there are.
        device: that accelerate gave this process; None when it is alone.
        sharded: the launcher asked for FSDP, or for DeepSpeed.
        offload: and FSDP's shards are to rest in the memory of the machine (`fsdp_offload_params`).
        zero3: where the shards are DeepSpeed's, how it is to make them (its `zero_optimization`).
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    sharded: bool = False
    offload: bool = False
    zero3: dict[str, Any] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and the MLflow run."""
        return self.index == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process' share of items that all processes hold: every `count`-th one."""
        return list(items[self.index :: self.count])

    def gather(self, items: Sequence[T]) -> list[T]:
        """The shares of all processes (`mine`, or what became of its items) as one list in the first order again."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        shares: list[list[T]] = gather_object([list(items)])
        whole: list[T] = []
        for place in range(max(map(len, shares))):
            whole += [share[place] for share in shares if place < len(share)]
        return whole

    def agree(self, value: T) -> T:
        """The main process' value, in all processes."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def total(self, *values: float) -> list[float]:
        """Sums over the processes, in float64."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM) if self.count > 1 else list(values)

    def largest(self, *values: float) -> list[float]:
        """Largest values among the processes."""
        return self._reduced(values, torch.distributed.ReduceOp.MAX) if self.count > 1 else list(values)

    def _reduced(self, values: Sequence[float], how: object) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(numbers, op=how)
        return list(numbers.tolist())


ALONE = Ranks()
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others before PyTorch ends it."""


def index_and_count() -> tuple[int, int]:
    """Which process this is, and of how many, as its launcher says; 0 of 1 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched(device: str | None = None) -> Ranks:
    """The processes that a launcher started together with this one, connected; `ALONE` without a launcher.

    Args:
        device: `cpu` keeps processes off the GPUs, where there are any.

    Raises:
        ConfigError: the launcher asks for what would not be done, or the processes cannot be connected.
    """
    cpu = device == "cpu" or not torch.accelerator.is_available()
    if cpu:
        # DeepSpeed, which accelerate imports where it is installed, would look for GPUs by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if _is_true("ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError(
            "the launcher is configured for Megatron-LM, which this trainer does not use; scripts/configs/fsdp2.yaml "
            "shards weights, gradients and optimiser"
        )
    deepspeed = _is_true("ACCELERATE_USE_DEEPSPEED")
    sharded = deepspeed or _is_true("ACCELERATE_USE_FSDP")
    offload = sharded and _is_true("FSDP_OFFLOAD_PARAMS")
    _, count = index_and_count()
    if count == 1:
        if offload or deepspeed:
            what = "DeepSpeed" if deepspeed else "fsdp_offload_params"
            raise ConfigError(
                f"{what} is for the shards of several processes, and there is one; start more (--num_processes), "
                "or take it out of the launcher's configuration"
            )
        return ALONE
    zero3 = _zero_optimization() if deepspeed else None
    from accelerate import PartialState

    # Processes wait for the slowest rollouts of a step, which may take longer than NCCL's ten minutes.
    # Where there is no GPU, accelerate has to be told: it would leave the processes unconnected, each on its own.
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != count:
        raise ConfigError(
            f"the launcher started {count} processes, and accelerate connects {state.num_processes} "
            "of them; is there a GPU for each? Else pass --device cpu"
        )
    # Else transformers leaves models empty in all processes but the first, and they are to sample from them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return Ranks(state.process_index, state.num_processes, state.device, sharded, offload, zero3)


def _zero_optimization() -> dict[str, Any]:
    """What the launcher asks of DeepSpeed, under its names. Raises ConfigError where it cannot be done."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'the launcher is configured for DeepSpeed, which is missing ({error}): pip install "carl-gym[deepspeed]"'
        ) from error
    from accelerate.utils import DeepSpeedPlugin

    try:
        asked: dict[str, Any] = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    except (ValueError, OSError, NotImplementedError) as error:
        raise ConfigError(f"the launcher's configuration of DeepSpeed cannot be used ({error})") from error
    if asked.get("stage") != 3:
        raise ConfigError(
            f"the launcher is configured for DeepSpeed's ZeRO stage {asked.get('stage')}; 3 is used "
            "(scripts/configs/zero3.yaml), or no DeepSpeed, for whole weights in every process (ddp.yaml)"
        )
    if "nvme" in [(asked.get(what) or {}).get("device") for what in ("offload_optimizer", "offload_param")]:
        raise ConfigError("the launcher has DeepSpeed offload to NVMe, which is not supported; offload to the cpu")
    return asked


def _is_true(variable: str) -> bool:
    """Of those in which a launcher hands its configuration to the processes."""
    return os.environ.get(variable, "false").lower() in ("1", "true")
