"""LoRA: low-rank matrices that learn in place of the model, whose own weights stay as they are (arXiv 2106.09685).

The learner's model is given PEFT's layers. To everybody else its weights are those of a plain model, with the adapter
added; a checkpoint has both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from carl_gym.errors import ConfigError, DataError
from carl_gym.training.parallel import mass

FOLDER = "adapter"
"""In a checkpoint; PEFT loads it onto the model that the run began with."""
_WEIGHTS = "adapter_model.safetensors"
_NAME, _PREFIX, _BASE = ".default", "base_model.model.", ".base_layer"


class Adapter:
    """LoRA on all linear layers of a model but the head, which learns alone.

    Args:
        model: changed in place; whole, before it is spread over processes.
        rank: r, of the matrices.
        alpha: W + alpha / r B A takes W's place.
        checkpoint: whose adapter to go on with; a new one, which changes nothing yet, by default.

    Raises:
        ConfigError: PEFT is not installed, or finds no such layers.
        DataError: the adapter cannot be read, or was trained on other weights.
    """

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float, checkpoint: Path | None = None) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("lora_rank needs the package peft: pip install 'carl-gym[lora]'") from error
        self._mass = mass(model.parameters())
        self._settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        try:
            inject_adapter_in_model(self._settings, model)
        except ValueError as error:
            raise ConfigError(f"lora_rank: PEFT finds no layers in {type(model).__name__} ({error})") from error
        if checkpoint is not None:
            self._read({n: p for n, p in model.named_parameters() if p.requires_grad}, checkpoint / FOLDER / _WEIGHTS)

    def save(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write it as PEFT does, into `FOLDER`.

        Args:
            weights: of the parameters that learn, by name, whole.
            folder: of the checkpoint.
        """
        self._settings.save_pretrained(folder / FOLDER)
        tensors = {_name(name): tensor.cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / FOLDER / _WEIGHTS, metadata={"format": "pt", "mass": repr(self._mass)})

    def _read(self, own: Mapping[str, torch.Tensor], path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                with torch.no_grad():
                    for name, parameter in own.items():
                        parameter.copy_(file.get_tensor(_name(name)))
                before = float(file.metadata()["mass"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise DataError(
                f"{path}: not the adapter of this run ({error}); delete its checkpoint to go on from an older one"
            ) from error
        if not math.isclose(before, self._mass, rel_tol=1e-9):
            raise DataError(
                f"{path} was trained on other weights (sum of sizes {before:g}) than the run has now "
                f"({self._mass:g}); give it the agent that it began with"
            )


def plain_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights by name, as if it had never had an adapter: with the adapter's matrices added.

    Args:
        model: whose layers say how.
        weights: of all its parameters, whole.
    """
    found = dict(weights)
    for name, layer in _layers(model):
        a, b = (found.pop(f"{name}.lora_{side}{_NAME}.weight") for side in "AB")
        change = layer.scaling[_NAME[1:]] * (b @ a)
        found[f"{name}.weight"] = found.pop(f"{name}{_BASE}.weight") + (change.T if layer.fan_in_fan_out else change)
        if (bias := found.pop(f"{name}{_BASE}.bias", None)) is not None:
            found[f"{name}.bias"] = bias
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those with LoRA, by name."""
    return ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A"))


def _name(name: str) -> str:
    """A parameter's name in PEFT's files."""
    return _PREFIX + name.replace(_NAME, "")
