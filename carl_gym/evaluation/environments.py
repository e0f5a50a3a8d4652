"""The environments of an evaluation: which arguments go to which, their data, and the questions that are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carl_gym.cards import parse_assignments
from carl_gym.envs.registration import make_task, task_arguments
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.errors import ConfigError
from carl_gym.evaluation.setting import gold_recall, held_out_first, questions_fingerprint, retrieval_setting


@dataclass(frozen=True, slots=True)
class Environment:
    """What every agent is evaluated on.

    Attributes:
        task: the environment.
        questions: in the order in which they are asked.
        setting: what scores depend on (`retrieval_setting`), number and fingerprint of the questions.
        gold_recall_at_10: of the questions themselves as queries; None where the data names no supporting titles.
    """

    task: SearchTask
    questions: tuple[Question, ...]
    setting: dict[str, str | int | float]
    gold_recall_at_10: float | None

    @property
    def label(self) -> str:
        """The name that scores are reported under."""
        return self.task.label

    def as_dict(self) -> dict[str, Any]:
        """What reports say about it."""
        return {"env": self.label, "setting": self.setting, "gold_recall_at_10": self.gold_recall_at_10}


def load_environments(
    ids: Sequence[str],
    *,
    count: int = 0,
    split: str | None = None,
    data_dir: str | None = None,
    world: int | None = None,
    assignments: Sequence[str] = (),
) -> list[Environment]:
    """Load data and index of every environment.

    Args:
        ids: environments, or card files, each once.
        count: questions per environment, those first that training holds out; 0 for all.
        split: of the original data; for generated worlds `train` or `test`, which is the default there.
        data_dir: folder with the data, where one environment takes it.
        world: seed of generated worlds.
        assignments: `key=value` for every environment that takes it, `id:key=value` for one.

    Raises:
        ConfigError: an environment twice, an assignment to another one, or fewer questions than asked for.
        CardError, DataError: as `make_task`.
    """
    takes = {id: task_arguments(id) for id in ids}
    if data_dir is not None and sum("data_dir" in names for names in takes.values()) > 1:
        raise ConfigError(
            f"--data-dir {data_dir} is the data of one environment, and there are several; give --env-args "
            f"{ids[0]}:data_dir={data_dir} and so on, or set CARL_GYM_DATA to a folder of data folders"
        )
    options = {name: value for name, value in (("data_dir", data_dir), ("world", world)) if value is not None}
    found = []
    for id, given in assign(takes, options, assignments).items():
        arguments: dict[str, object] = {}
        if "world" in takes[id]:
            arguments |= {"split": split or "test"} | ({"questions": count} if count else {})
        elif split is not None:
            arguments["source_split"] = split
        task = make_task(id, **arguments | given)
        if count > len(task.questions):
            raise ConfigError(
                f"--questions {count}, but {task.source} has only {len(task.questions)}; lower it, or 0 for all of them"
            )
        questions = tuple(held_out_first(task.questions.values())[: count or None])
        setting = retrieval_setting(task)
        setting |= {"questions": len(questions), "questions_fingerprint": questions_fingerprint(questions)}
        found.append(Environment(task, questions, setting, gold_recall(task, questions)))
    labels = [environment.label for environment in found]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--envs {' '.join(ids)}: each environment once; evaluate two settings of one in two runs")
    return found


def assign(
    takes: Mapping[str, set[str]], options: Mapping[str, object], assignments: Sequence[str]
) -> dict[str, dict[str, object]]:
    """The arguments of every environment.

    What all may have goes to those that take it; what nobody takes goes to all, whose `make_task` then says what is
    wrong with it. What is assigned to one environment by its id comes before what all get.

    Args:
        takes: names of the arguments of every environment.
        options: arguments for all, by name.
        assignments: further ones, `key=value`, or `id:key=value` for one environment.

    Raises:
        ConfigError: an assignment to an environment that is not evaluated.
        CardError: no assignment, or one key twice.
    """
    shared: list[str] = []
    own: dict[str, list[str]] = {id: [] for id in takes}
    for item in assignments:
        left, equals, value = item.partition("=")
        id, colon, key = left.rpartition(":")
        if not colon:
            shared.append(item)
        elif id in own:
            own[id].append(f"{key}{equals}{value}")
        else:
            raise ConfigError(f"--env-args {item}: {id!r} is not evaluated; --envs has {', '.join(takes)}")
    for_all = dict(options) | parse_assignments(shared)
    taken = set().union(*takes.values())
    return {
        id: {name: value for name, value in for_all.items() if name in names or name not in taken}
        | parse_assignments(own[id])
        for id, names in takes.items()
    }
