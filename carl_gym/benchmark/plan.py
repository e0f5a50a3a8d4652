"""Which training runs a benchmark consists of, and which of them come next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np

from carl_gym.benchmark.arms import Arm, make_config, rate_of
from carl_gym.errors import ConfigError
from carl_gym.training.config import MAY_CHANGE, TrainConfig

Phase = Literal["search", "final"]

UNCOUNTED = (*MAY_CHANGE, "experiment", "device")
"""Options in which two runs may differ and still be the same cell."""


@dataclass(frozen=True)
class Cell:
    """A training run of the grid.

    Attributes:
        arm: the arm's name.
        phase: `search` chooses the learning rate, `final` is what is reported.
        config: of the run, its folder included.
        start: fingerprint of the weights that it starts from.
    """

    arm: str
    phase: Phase
    config: TrainConfig
    start: str = ""

    @property
    def name(self) -> str:
        """Unique within a benchmark."""
        return "/".join(self.config.output_dir.parts[-2:])

    @cached_property
    def key(self) -> str:
        """Equal for cells whose results are those of the same experiment."""
        return settings_key(self.config.as_dict(), self.start)


@dataclass(frozen=True)
class Choice:
    """The learning rate of an arm.

    Attributes:
        rate: the chosen one.
        scores: mean final EM over the search seeds by rate; empty where there was nothing to search.
        source: the arm that was searched, or "" for a rate that was given.
    """

    rate: float
    scores: Mapping[float, float]
    source: str = ""

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those that were tried might be better."""
        return len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


@dataclass(frozen=True)
class Plan:
    """The grid.

    Attributes:
        arms: in order of importance: an arm is finished before the next one begins, as far as workers are free.
        shared: options of `TrainConfig` for all cells.
        search: what the cells of the search have otherwise.
        rates: learning rates to choose from; a single one is taken without a search.
        search_seeds: seeds of the search.
        seeds: number of final seeds by arm; they are 0, 1, ...
        folder: where runs go.
        start: fingerprint of the weights that all start from.

    Raises:
        ConfigError: seeds that come twice or are in the search and final, no rate, or settings that an algorithm does
            not have.
    """

    arms: tuple[Arm, ...]
    shared: Mapping[str, object]
    search: Mapping[str, object]
    rates: tuple[float, ...]
    search_seeds: tuple[int, ...]
    seeds: Mapping[str, int]
    folder: Path
    start: str = ""

    def __post_init__(self) -> None:
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"the learning rates are {list(self.rates)}: give at least one, and each once")
        if self.searches and not self.search_seeds:
            raise ConfigError("a search among learning rates needs at least one search seed")
        if len(set(self.search_seeds)) < len(self.search_seeds):
            raise ConfigError(f"the search seeds are {list(self.search_seeds)}: give each once")
        final = range(max(self.seeds.values()))
        if min(self.seeds.values()) < 1:
            raise ConfigError(f"every arm needs at least 1 seed, not {dict(self.seeds)}")
        if self.searches and (both := [seed for seed in self.search_seeds if seed in final]):
            raise ConfigError(f"seed {both[0]} is a seed of the search and a final one; search on other seeds")
        for arm in self.arms:
            self.cell(arm, "final", self.rates[0], 0)  # raises on settings that do not exist

    def cell(self, arm: Arm, phase: Phase, rate: float, seed: int) -> Cell:
        """One training run. Raises ConfigError, naming the arm, where it cannot be configured so."""
        values = {**self.shared, **(self.search if phase == "search" else {}), **arm.config}
        values |= {
            "algorithm": arm.algorithm,
            "learning_rate": rate,
            "seed": seed,
            "output_dir": self.folder / "cells" / arm.slug / f"{phase}-lr{rate:g}-seed{seed}",
            "tracking_uri": f"sqlite:///{self.folder.resolve() / 'mlflow.db'}",
        }
        if arm.algorithm_args:
            values["algorithm_args"] = arm.algorithm_args
        try:
            return Cell(arm.name, phase, make_config(values), self.start)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from error

    def search_cells(self, arm: Arm) -> list[Cell]:
        """What chooses the arm's learning rate; none where it is given or another arm's."""
        if rate_of(arm, self._by_name) is not arm or len(self.rates) == 1:
            return []
        return [self.cell(arm, "search", rate, seed) for rate in self.rates for seed in self.search_seeds]

    def final_cells(self, arm: Arm, rate: float) -> list[Cell]:
        """What is reported of the arm."""
        return [self.cell(arm, "final", rate, seed) for seed in range(self.seeds[arm.name])]

    def possible_cells(self) -> Iterator[Cell]:
        """Every cell that may come up, whichever learning rates are chosen."""
        for arm in self.arms:
            yield from self.search_cells(arm)
            given = rate_of(arm, self._by_name)
            for rate in self.rates if isinstance(given, Arm) else (given,):
                yield from self.final_cells(arm, rate)

    def choice(self, arm: Arm, score: Callable[[Cell], float | None]) -> Choice | None:
        """The arm's learning rate: the best mean score over the search seeds, the smallest of equals.

        Args:
            arm: whose rate.
            score: final EM of a cell of the search, None where it is not finished.

        Returns:
            None as long as the search is not finished.
        """
        source = rate_of(arm, self._by_name)
        if isinstance(source, float):
            return Choice(source, {})
        if len(self.rates) == 1:
            return Choice(self.rates[0], {})
        found: dict[float, list[float]] = {rate: [] for rate in sorted(self.rates)}
        for cell in self.search_cells(source):
            value = score(cell)
            if value is None:
                return None
            found[cell.config.learning_rate].append(value)
        means = {rate: float(np.mean(values)) for rate, values in found.items()}
        return Choice(max(means, key=lambda rate: means[rate]), means, source.name)

    def cells(self, score: Callable[[Cell], float | None]) -> list[Cell]:
        """All cells that are known so far, in order: arm by arm, search before final."""
        known = []
        for arm in self.arms:
            known += self.search_cells(arm)
            if (choice := self.choice(arm, score)) is not None:
                known += self.final_cells(arm, choice.rate)
        return known

    def size(self) -> int:
        """Number of cells, those included whose learning rate is not chosen yet."""
        return sum(len(self.search_cells(arm)) + self.seeds[arm.name] for arm in self.arms)

    @property
    def searches(self) -> bool:
        """Whether any arm's learning rate is chosen among several."""
        return len(self.rates) > 1 and any(rate_of(arm, self._by_name) is arm for arm in self.arms)

    @property
    def _by_name(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}


def settings(config: Mapping[str, object]) -> dict[str, object]:
    """What counts of a stored configuration; what an older version did not write down is as it is by default."""
    merged = json.loads(json.dumps({**_defaults(), **config}))
    return {name: value for name, value in sorted(merged.items()) if name not in UNCOUNTED and value is not None}


@cache
def _defaults() -> dict[str, object]:
    return TrainConfig().as_dict()


def settings_key(config: Mapping[str, object], start: str) -> str:
    """Hash of what counts of a configuration and of the weights at the start."""
    return blake2b(json.dumps([settings(config), start]).encode(), digest_size=8).hexdigest()
