#!/usr/bin/env bash
# Everything that must hold before a change is kept: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

ruff check .
ruff format --check .
mypy
python -m pytest -q "$@"
