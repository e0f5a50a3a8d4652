"""How the learner's model lies in the processes of a run: whole in each, or in shards (FSDP2); with its optimiser.

Whole, every process takes its own rows through a copy and gradients are averaged (DDP). In shards, parameters,
gradients and optimiser are split over the processes, and layers are put together as they are needed. Both average over
processes: a loss that is a sum over all of them is to be multiplied by their number. (`zero3.py` is a third way.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from carl_gym.agents.logprob_model import LogprobModel
from carl_gym.errors import ConfigError, PolicyError
from carl_gym.training.ranks import Ranks

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Spread:
    """A model in the processes of a run, and the optimiser of what learns in it. All processes call the same methods.

    Attributes:
        module: the model.
        optimizer: of its parameters, or of this process' shards of them.
        in_lockstep: whether processes have to call the modules in the model equally often.

    Args:
        module: with the same weights in every process. With shards its parameters are replaced.
        ranks: as the launcher started them.
        make_optimizer: of parameters.
        max_grad_norm: gradients are scaled down to this global norm.
        compute: dtype in which shards are put together; None for that of the parameters.

    Raises:
        ConfigError: shards of a model whose layers are not known, or that the launcher asks for and cannot be had.
        PolicyError: not all processes have the same weights.
    """

    in_lockstep = False

    def __init__(
        self,
        module: LogprobModel,
        ranks: Ranks,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float,
        compute: torch.dtype | None = None,
    ) -> None:
        check_same(module, ranks)
        self.module, self._ranks, self._max_grad_norm = module, ranks, max_grad_norm
        self._called: Any
        self._called, self.optimizer = self._laid_out(make_optimizer, compute)

    def _laid_out(
        self, make_optimizer: MakeOptimizer, compute: torch.dtype | None
    ) -> tuple[Any, torch.optim.Optimizer]:
        """What to call in place of the module, and the optimiser, which wants parameters as they are then."""
        called = _copied_or_sharded(self.module, self._ranks, compute)
        return called, make_optimizer(self.learning())

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward pass."""
        return self._called(*inputs, **named)

    @property
    def writes_shards(self) -> bool:
        """Whether every process writes its part of what the optimiser remembers (`write_shards`)."""
        return self._ranks.sharded

    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def apart(self, *, last: bool) -> AbstractContextManager[object]:
        """Around each pass of a step, forward and backward: copies exchange gradients once, in the last one. (Shards
        exchange theirs in every pass: keeping whole gradients is what they are there to avoid.)"""
        if isinstance(self._called, nn.parallel.DistributedDataParallel) and not last:
            return self._called.no_sync()
        return nullcontext()

    def step(self, *, allowed: bool) -> float:
        """One step of the optimiser, if it is allowed and gradients are finite; they are dropped otherwise.

        Returns:
            Global norm of the gradients; what is not finite says that no step was taken.
        """
        norm = float(whole(nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm)))
        if allowed and math.isfinite(norm):
            self.optimizer.step()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, *, keep: bool, trained: bool = False) -> dict[str, torch.Tensor]:
        """The model's parameters by name, put together one by one.

        Args:
            keep: whether this process wants them; an empty mapping otherwise.
            trained: those alone that learn.
        """
        found = {}
        for name, parameter in self.module.model.named_parameters():
            if trained and not parameter.requires_grad:
                continue
            tensor = self._whole(parameter, keep)
            if tensor is not None:
                found[name] = tensor
        return found

    def _whole(self, parameter: nn.Parameter, keep: bool) -> torch.Tensor | None:
        tensor = whole(parameter.detach())
        if not keep:
            return None
        return tensor.cpu() if isinstance(parameter, DTensor) else tensor  # not a second model on the GPU

    def state(self) -> dict[str, Any]:
        """Everything that the optimiser remembers, by names of parameters and put together, so that any number of
        processes can go on with it. With shards the first process gets it, the others nothing.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        if not self.optimizer.state:
            return {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.module, self.optimizer, options=options)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave, in every process. States by number, of older checkpoints, are read as well.

        Raises:
            KeyError, ValueError, RuntimeError: it is of other parameters.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        if not state:
            return
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(
            self.module, self.optimizer, optim_state_dict=named_state(self.module, state), options=options
        )

    def write_shards(self, folder: Path, group: ProcessGroup | None = None) -> Future[Any]:
        """Every process writes its shards of what the optimiser remembers, as safetensors, which nothing unpickles.

        Args:
            folder: for all processes the same.
            group: through which they talk, when it is to be written beside other things, from a copy; it is written
                when this returns otherwise.

        Returns:
            A future, which also has the failure: of the disk (OSError), or CheckpointException, that of any process.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save, save

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        if group is not None:
            saved = async_save(self._moments(), storage_writer=writer, process_group=group)
            assert isinstance(saved, Future)
            return saved
        done: Future[Any] = Future()
        try:
            done.set_result(save(self._moments(), storage_writer=writer))
        except (OSError, CheckpointException) as error:
            done.set_exception(error)
        return done

    def read_shards(self, folder: Path) -> None:
        """What `write_shards` wrote, by any number of processes, in shards or not."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        moments = self._moments()
        read_moments(moments, folder)
        state = self._flat_state() | moments
        set_optimizer_state_dict(self.module, self.optimizer, optim_state_dict=state, options=_flat())

    def _moments(self) -> dict[str, Any]:
        """Tensors by name, in this process' shards."""
        return {name: value for name, value in self._flat_state().items() if isinstance(value, torch.Tensor)}

    def _flat_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self.module, self.optimizer, options=_flat()))


def check_same(module: nn.Module, ranks: Ranks) -> None:
    """Raise PolicyError if not all processes have the same weights."""
    if ranks.count == 1:
        return
    own = mass(module.parameters())
    highest, negative = ranks.largest(own, -own)
    if not math.isclose(highest, -negative, rel_tol=1e-9):  # machines may add up differently
        raise PolicyError(
            f"the processes of this run loaded different weights of {type(module.model).__name__} (sums of sizes from "
            f"{-negative:g} to {highest:g}); give all of them the same model folder, and the same checkpoint to resume"
        )


def _copied_or_sharded(module: LogprobModel, ranks: Ranks, compute: torch.dtype | None) -> nn.Module:
    """What to call in place of the module; with shards it is the module itself."""
    if ranks.count == 1:
        return module
    if not ranks.sharded:
        on_gpu = ranks.device is not None and ranks.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(module, device_ids=[ranks.device] if on_gpu else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    assert ranks.device is not None
    kinds = set(getattr(module.model, "_no_split_modules", None) or ())
    layers = [layer for layer in module.modules() if type(layer).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"{type(module.model).__name__} does not say which of its modules are layers (_no_split_modules), so FSDP "
            "cannot shard it; start the processes without FSDP"
        )
    options: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.count,)),
        # Else a forward pass alone, as the canary's, would leave layers put together, in the compute dtype.
        "reshard_after_forward": True,
        # Casting inputs would copy the tree that layers report to; autocast does what is needed.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
        ),
    }
    if ranks.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(module, **options)
    return module


def mass(tensors: Iterable[torch.Tensor]) -> float:
    """Sum of sizes, in float64: tells weights apart from others of the same shapes."""
    return sum(float(tensor.detach().abs().sum(dtype=torch.float64)) for tensor in tensors)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its shards; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def named_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state by names of parameters, where it may be by their numbers. Raises KeyError, IndexError."""
    if not all(isinstance(key, int) for key in state["state"]):
        return dict(state)
    names = [name for name, _ in module.named_parameters()]
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def read_moments(moments: dict[str, Any], folder: Path) -> None:
    """Fill tensors by name, whole or shards, with what shards of other processes hold."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone, it is meant so
        load(moments, storage_reader=HuggingFaceStorageReader(str(folder)))


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)
