#!/usr/bin/env bash
# From a fresh clone to a trained search agent: sets up, trains the tiny agent with CARL-Lite on MiniWiki, and
# leaves a before/after table, a learning curve, a drawn rollout tree and an MLflow run under runs/. Called again, it
# goes on where it was stopped. Arguments go to scripts/train_carl.py. One thread is enough for a model of this size, and
# two that have to wait for each other on a busy machine are many times slower.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

resume=()
[ ! -e runs/quickstart/config.json ] || resume=(--resume)
python scripts/train_carl.py --algorithm carl-lite --threads 1 --steps 14 --eval-every 5 --output-dir runs/quickstart \
    ${resume[@]+"${resume[@]}"} --compare benchmarks/results/grpo-miniwiki.json "$@"

[ "$VIRTUAL_ENV" != "$(pwd)/.venv" ] || echo "(before that command: source .venv/bin/activate)"
