"""carl-gym: search environments and criticality-aware reinforcement learning (CARL) for agents that act in text.

Importing the package registers every environment card: `gymnasium.make("carl/HotpotQA-v0")` works from then on.
"""

from carl_gym.envs.gym_env import SearchEnv
from carl_gym.envs.registration import make_task, register_card, register_cards, register_critical_tree

__all__ = ["SearchEnv", "make_task", "register_card"]

register_cards()
register_critical_tree()
