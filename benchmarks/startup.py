"""How long it takes until something happens, and in how much memory, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--repeats 5] [--data-dir DIR]

What the first column names is a process of its own, started `--repeats` times; the numbers are medians. CPU seconds are
those of all threads and suffer less from other jobs on the machine; peaks of memory are Linux's VmHWM. HotpotQA is read
from `--data-dir` or CARL_GYM_DATA, with its index built beforehand. The last table holds what a model costs in
training: bytes per parameter of weights, gradients and AdamW after one optimiser step, counted from the tensors.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

import tyro

MAKE = "env = gymnasium.make('carl/MiniWiki-v0')"
MAKE_HOTPOTQA = "env = gymnasium.make('carl/HotpotQA-v0', data_dir=DATA)"
PLAY = "env.reset(seed=0); env.step('<search>a city on a river</search>')"
LOAD = "agent = load_agent('tiny', device='cpu')"
PROMPT = "requests = [SampleRequest(agent.transcript.prompt('Who?'), seed=0, max_tokens=16)]"
ENGINE = "agent = load_agent('tiny', backend='vllm', trainable=False)"
SCENARIOS = {
    "gymnasium alone": (("import gymnasium", "import gymnasium"),),
    "MiniWiki": (
        ("import carl_gym", "import gymnasium, carl_gym"),
        ("gym.make", MAKE),
        ("first reset and step", PLAY),
    ),
    "HotpotQA": (
        ("import carl_gym", "import gymnasium, carl_gym"),
        ("gym.make, index on disk", MAKE_HOTPOTQA),
        ("first reset and step", PLAY),
    ),
    "torch and transformers alone": (("import", "import torch; from transformers import AutoModelForCausalLM"),),
    "tiny agent": (
        ("import", "from carl_gym.agents.agent import load_agent; from carl_gym.agents.policy import SampleRequest"),
        ("load_agent", LOAD),
        ("first action", f"{PROMPT}; agent.policy.sample(requests)"),
        ("second action", "agent.policy.sample(requests)"),
    ),
    "training": (
        ("import carl_gym.training.trainer", "import carl_gym.training.trainer"),
        ("import carl_gym.training.cli", "import carl_gym.training.cli"),
    ),
    "tiny agent on vLLM": (
        ("import", "from carl_gym.agents.agent import load_agent; from carl_gym.agents.policy import SampleRequest"),
        ("engine start", ENGINE),
        ("first action", f"{PROMPT}; agent.policy.sample(requests)"),
        ("second action", "agent.policy.sample(requests)"),
    ),
}
"""Steps of each: what it is called, and the statement."""

MEMORY = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from carl_gym.training.learner import Learner
for name in ("tiny", "100M"):
    torch.manual_seed(0)
    if name == "tiny":
        from carl_gym.agents.agent import load_agent
        model = load_agent("tiny", device="cpu").model
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1264, hidden_size=768, intermediate_size=2048,
                                             num_hidden_layers=14, num_attention_heads=24))
    learner = Learner(model, learning_rate=1e-6)
    count = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    learner.optimizer.step()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    moments = sum(t.numel() * t.element_size() for s in learner.optimizer.state.values() for t in s.values())
    print(json.dumps([name, count, weights / count, gradients / count, moments / count]))
"""


@dataclass(frozen=True)
class Options:
    """Measure imports, gym.make, first steps and first actions, each in a fresh process."""

    repeats: int = 5
    """Processes per row."""
    data_dir: str | None = None
    """Folder of folders with real data; CARL_GYM_DATA by default."""
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    """Rows to measure."""


def main(options: Options) -> None:
    data = options.data_dir or os.environ.get("CARL_GYM_DATA")
    print("| | step | s since the start | in this step | CPU s in this step | peak MiB |\n|---|---|" + "---:|" * 4)
    for name in options.scenarios:
        if reason := missing(name, data):
            print(f"| {name} | skipped: {reason} | | | | |")
            continue
        if name == "HotpotQA":
            marks(SCENARIOS[name], data)  # builds the index where there is none
        runs = [marks(SCENARIOS[name], data) for _ in range(options.repeats)]
        before = (0.0, 0.0)
        for i, (step, _) in enumerate(SCENARIOS[name]):
            wall, cpu, peak = (median(run[i][part] for run in runs) for part in range(3))
            cells = (f"{wall:.2f}", f"{wall - before[0]:.3f}", f"{cpu - before[1]:.3f}", f"{peak:,.0f}")
            print(f"| {name} | {step} | {' | '.join(cells)} |", flush=True)
            before = (wall, cpu)
    print("\n| model | parameters | weights, bytes per parameter | gradients | AdamW |\n|---|---:|---:|---:|---:|")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    for row in map(json.loads, done.stdout.splitlines()):
        print(f"| {row[0]} | {row[1]:,} | " + " | ".join(f"{size:.1f}" for size in row[2:]) + " |")


def missing(name: str, data: str | None) -> str:
    """Why a row cannot be measured; "" if it can."""
    if name == "HotpotQA" and not data:
        return "no data; set CARL_GYM_DATA"
    if name.endswith("vLLM") and importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    return ""


def marks(steps: tuple[tuple[str, str], ...], data: str | None) -> list[tuple[float, float, float]]:
    """Run the statements in a new process: after each, wall and CPU seconds since its start and peak memory in MiB."""
    lines = ["import json, time", "from pathlib import Path", f"DATA, MARKS = {f'{data}/hotpotqa'!r}, []"]
    mark = "MARKS.append((time.time(), time.process_time(), Path('/proc/self/status').read_text()))"
    for _, statement in steps:
        lines += [statement, mark]
    code = "\n".join([*lines, "print('MARKS' + json.dumps(MARKS))"])
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{code}\nfailed:\n{done.stderr}")
    found = json.loads(done.stdout.split("MARKS")[-1])
    return [(at - started, cpu, int(text.split("VmHWM:")[1].split()[0]) / 1024) for at, cpu, text in found]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
