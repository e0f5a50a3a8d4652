"""Environments: a pure task core, its Gymnasium shell, the action protocol, rewards, cards and data."""
