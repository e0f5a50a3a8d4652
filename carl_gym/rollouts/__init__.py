"""From questions to rollout trees: what a tree is, what to roll out next, and the batched collector."""

from carl_gym.rollouts.collector import EnvTask, Schedule, Timings, collect
from carl_gym.rollouts.explorers import EntropyForking, Explorer, RandomForking, RootExplorer
from carl_gym.rollouts.tree import Node, RolloutTree

__all__ = [
    "EntropyForking",
    "EnvTask",
    "Explorer",
    "Node",
    "RandomForking",
    "RolloutTree",
    "RootExplorer",
    "Schedule",
    "Timings",
    "collect",
]
