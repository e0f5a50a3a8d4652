"""Algorithms as named combinations of explorer, credit and selection, one file each; the trainer is blind to them."""

from carl_gym.algorithms import (  # noqa: F401  registers them
    a2tgpo,
    actfocus,
    arpo,
    carl,
    dr_grpo,
    empg,
    gigpo,
    grpo,
    hgpo,
    igpo,
    lite_ppo,
    mapo,
    ppo,
    rloo,
    salt,
    tree_grpo,
    treerl,
    vineppo,
)
from carl_gym.algorithms.algorithm import (
    Algorithm,
    CriticSettings,
    algorithm_names,
    get_algorithm,
    register_algorithm,
)
from carl_gym.algorithms.credit import group_normalised, tree_difference, values
from carl_gym.algorithms.selection import all_actions, forked_states, token_weights

__all__ = [
    "Algorithm",
    "CriticSettings",
    "algorithm_names",
    "all_actions",
    "forked_states",
    "get_algorithm",
    "group_normalised",
    "register_algorithm",
    "token_weights",
    "tree_difference",
    "values",
]
