"""Ways into the environments from other libraries; each module needs the library that it is named after.

`trl` (GRPOTrainer), `verifiers`, `skyrl` (SkyRL-Gym), `step_api` (gem, and plain `(obs, reward, done, info)` loops)
and `discrete` (finitely many actions, for classical learners); and our trees in the trainers of others: `trl_trees`
(inside GRPOTrainer) and `verl` (as its tensors). docs/adapters.md shows each.
"""
