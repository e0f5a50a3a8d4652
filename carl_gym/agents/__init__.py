"""Agents: the policy contract and what implements it."""
