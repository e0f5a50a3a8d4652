"""The learner's model in DeepSpeed's shards (ZeRO-3): the third way of `parallel.py`, with the same methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carl_gym.errors import ConfigError
from carl_gym.training.parallel import MakeOptimizer, Spread, named_state, read_moments

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter, beside the number of steps."""


class Zero3(Spread):
    """See `Spread`. Of the launcher's configuration `zero_optimization` is used, and nothing else: clipping, optimiser
    and dtypes are the run's.

    A process that puts a layer together waits for all others to do so: they have to call it equally often. What the
    optimiser remembers is put together for checkpoints: DeepSpeed's own would be pickles.
    """

    in_lockstep = True

    @property
    def writes_shards(self) -> bool:
        """See `Spread`."""
        return False

    def _laid_out(
        self, make_optimizer: MakeOptimizer, compute: torch.dtype | None
    ) -> tuple[Any, torch.optim.Optimizer]:
        import deepspeed

        # DeepSpeed's calls, several in each pass, which nobody here can change.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        optimizer = make_optimizer(self.learning())
        autocast = {"enabled": True, "dtype": str(compute).removeprefix("torch.")} if compute else {"enabled": False}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # nobody counts by it: passes end where `apart` says so
            "gradient_clipping": self._max_grad_norm,
            "zero_optimization": self._ranks.zero3,
            "zero_allow_untested_optimizer": True,  # torch's own AdamW, also where shards are offloaded
            "zero_force_ds_cpu_optimizer": False,
            # Else gradients would travel, and be added up, in the compute dtype.
            "torch_autocast": {**autocast, "lower_precision_safe_modules": []},
        }
        try:
            engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=config, dist_init_required=False
            )
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"DeepSpeed refuses the launcher's zero_optimization: {error}") from error
        return engine, optimizer

    def apart(self, *, last: bool) -> AbstractContextManager[object]:
        """Around each pass of a step; gradients are exchanged in all of them."""
        self._called.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self, *, allowed: bool) -> float:
        """One step of the optimiser; DeepSpeed takes none where gradients are not finite."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        if not allowed and self._ranks.is_main:
            spoiled = safe_get_local_grad(self.learning()[0]).clone()
            spoiled[0] = torch.nan  # no more of it: what fills up the last process' shard would stay so
            safe_set_local_grad(self.learning()[0], spoiled)
        self._called.step()
        return float(self._called.get_global_grad_norm())

    def weights(self, *, keep: bool, trained: bool = False) -> dict[str, torch.Tensor]:
        """See `Spread`."""
        self._called.empty_partition_cache()  # a forward pass alone leaves layers that it has begun to put together
        return super().weights(keep=keep, trained=trained)

    def _whole(self, parameter: nn.Parameter, keep: bool) -> torch.Tensor | None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if keep else None

    def state(self) -> dict[str, Any]:
        """Everything that the optimiser remembers; the first process gets it, the others nothing."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimizer.state:
            return {}
        steps = next(iter(self.optimizer.state.values()))["step"]
        found = {}
        for name, parameter in self._named():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if self._ranks.is_main:
                found[name] = {"step": steps.clone()} | {key: moment.cpu() for key, moment in moments.items()}
        if not found:
            return {}
        groups = [group | {"params": list(found)} for group in self.optimizer.param_groups]
        return {"state": found, "param_groups": groups}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` of any layout gave, in every process. Raises KeyError, ValueError: it is of other parameters."""
        if not state:
            return
        known = named_state(self.module, state)["state"]
        self._begin(next(iter(known.values()))["step"])
        for name, parameter in self._named():
            self._remember(parameter, name, known[name])

    def read_shards(self, folder: Path) -> None:
        """What the shards of FSDP2 hold."""
        for number, (name, parameter) in enumerate(self._named()):  # one by one: each process puts all of it together
            flat = {f"state.{name}.{key}": torch.empty(parameter.ds_shape) for key in MOMENTS}
            flat[f"state.{name}.step"] = torch.empty(())
            read_moments(flat, folder)
            known = {key: flat[f"state.{name}.{key}"] for key in ("step", *MOMENTS)}
            if number == 0:
                self._begin(known["step"])
            self._remember(parameter, name, known)

    def _named(self) -> list[tuple[str, Any]]:
        """The parameters that learn, with their names."""
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _begin(self, step: torch.Tensor) -> None:
        """Give the optimiser, which takes none before its first step, something to put moments into."""
        for shard in self._called.optimizer.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(shard) for key in MOMENTS}
            self.optimizer.state[shard] = {"step": step.clone(), **moments}

    def _remember(self, parameter: Any, name: str, known: Mapping[str, torch.Tensor]) -> None:
        """Take this process' part of a parameter's moments."""
        from deepspeed.utils import safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_zero_partition_rank
        for key in MOMENTS:
            if known[key].shape != parameter.ds_shape:
                raise ValueError(f"{key} of {name} has another shape: {tuple(known[key].shape)}")
            own = known[key].flatten()[start : start + size]
            own = nn.functional.pad(own, (0, size - len(own)))  # the last process' shard is filled up
            safe_set_local_optimizer_state(parameter, own, key)
