"""Anchors: where independent rollouts of a question meet, so that their actions can be compared without a tree.

Two nodes of a question are the same state when their observation tokens are equal: what the agent sees now, whatever
came before. The roots of a question are equal. An action is named by the id of the node that it led into.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from carl_gym.envs.state import ParsedAction
from carl_gym.rollouts.tree import Node, RolloutTree


def same_situation(tree: RolloutTree, states: int = 1) -> list[list[int]]:
    """Groups of actions that were taken after the same last `states` observations; with 1, in the same state.

    An action with fewer observations before it is in no group, every other one in exactly one, if need be alone.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for node in tree.nodes:
        if node.parent is not None and node.depth >= states:
            seen = tree.path(node.parent)[-states:]
            groups[tuple(before.observation_tokens for before in seen)].append(node.id)
    return list(groups.values())


def same_transition(tree: RolloutTree) -> list[list[int]]:
    """Groups of equal transitions (s, a, s'): the same action, taken in the same state, that led to the same state.

    Actions are the same when the environment understood the same (thoughts may differ). All ends are one state. Every
    action is in exactly one group, if need be alone.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for node in tree.nodes:
        if node.parent is not None:
            source = tree.nodes[node.parent]
            transition = source.observation_tokens, _understood(source, node), node.terminal, node.observation_tokens
            groups[transition].append(node.id)
    return list(groups.values())


def _understood(source: Node, node: Node) -> ParsedAction | str:
    """What the environment recorded of the action; its text where nothing was recorded."""
    turns = node.state.turns[len(source.state.turns) :]
    if turns:
        return turns[0].action
    return node.action.text if node.action else ""
