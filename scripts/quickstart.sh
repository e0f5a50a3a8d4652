#!/usr/bin/env bash
# From a fresh clone to a trained search agent: sets up, trains the tiny agent with CARL-Lite on MiniWiki, and
# leaves a before/after table, a learning curve, a drawn rollout tree and an MLflow run under runs/.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

python scripts/train_carl.py --preset quickstart --output-dir runs/quickstart "$@"

echo
echo "Results:  runs/quickstart (summary.json, metrics.jsonl, pictures)"
echo "MLflow:   mlflow ui --backend-store-uri sqlite:///$(pwd)/runs/mlflow.db"
[ "$VIRTUAL_ENV" != "$(pwd)/.venv" ] || echo "          (after: source .venv/bin/activate)"
