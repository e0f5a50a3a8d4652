"""Training with carl-gym beside TRL's GRPOTrainer, as Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/trl_comparison.py [--parts speed curve] [--output DIR]

Both train the same model from the same weights on the same questions of MiniWiki in the same order, with as many
rollouts per question, the same prompts, action budget, reward, AdamW and clipping of the gradient, one optimiser step
per batch of rollouts, in float32. TRL plays through its `rollout_func`: every turn of all live rollouts is one call of
its own `generate`, which stops at the closing tags (each is one token of the tiny agent), and the environment takes the
whole batch at once. Its loss is `dapo`, the mean over the generated tokens, as ours; its advantages divide by
std + 1e-4 where ours divide by std + 1e-6.

Every run has a process of its own. For the speeds all of them live at the same time and take steps in turns, one at a
time, so that a noisy machine slows all of them; the first steps warm up. The curves count the actions that were
generated: carl-lite generates about half as many per step and gets twice the steps.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
import tyro

from carl_gym.agents.agent import Agent, load_agent
from carl_gym.envs.task import SearchTask
from carl_gym.evaluation import evaluate
from carl_gym.files import write_json
from carl_gym.rollouts.collector import MIN_ACTION_TOKENS
from carl_gym.tracking.curves import learning_curve
from carl_gym.training.config import TrainConfig
from carl_gym.training.questions import load_data, take_questions
from carl_gym.training.trainer import Trainer

Method = Literal["trl", "grpo", "carl", "carl-lite"]
NAMES: dict[Method, str] = {"trl": "TRL GRPO", "grpo": "our GRPO", "carl": "our CARL", "carl-lite": "our CARL-Lite"}
STEPS_FACTOR: dict[Method, int] = {"carl-lite": 2}
"""Steps until about as many actions are generated as in one step of the others."""

CLOCKS = ("seconds", "cpu")
NO_MATTER = ("parts", "methods", "seeds", "output", "speed_steps", "warm_up")
"""Options that do not change a learning curve."""


@dataclass(frozen=True)
class Options:
    """Measure seconds per optimiser step and per 1,000 actions, and draw learning curves."""

    parts: tuple[Literal["speed", "curve"], ...] = ("speed", "curve")
    """What to measure."""
    methods: tuple[Method, ...] = ("trl", "grpo", "carl", "carl-lite")
    """What to measure it of."""
    agent: str = "tiny"
    """Agent card or model folder; the closing tags must be single tokens of its tokenizer."""
    questions: int = 8
    """Questions per optimiser step."""
    rollouts: int = 16
    """Rollouts per question of GRPO; CARL has its own numbers."""
    trl_batch: int = 32
    """Rollouts per micro-batch of TRL's update (`per_device_train_batch_size`)."""
    trl_cache: str | None = None
    """TRL's `cache_implementation`, such as static."""
    speed_steps: int = 3
    """Timed steps of each method."""
    warm_up: int = 1
    """Steps before them."""
    curve_steps: int = 12
    """Optimiser steps of a learning curve; twice as many for carl-lite."""
    eval_every: int = 2
    """Steps between evaluations."""
    eval_questions: int = 300
    """Held-out questions of each evaluation."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the learning curves."""
    threads: int = 1
    """CPU threads of torch, per process."""
    output: Path | None = None
    """Folder for results as JSON and the figure; finished curves in it are not run again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step.

    Attributes:
        seconds: of the whole step, by the wall clock.
        cpu: that the process was running in it, which other programs on the machine change less.
        generate, environment: seconds of it in the model and in the environment, while rolling out.
        update: seconds of it after the rollouts.
        actions: generated.
        reward: mean over rollouts.
    """

    seconds: float
    cpu: float
    generate: float
    environment: float
    update: float
    actions: int
    reward: float


def main(options: Options) -> None:
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    if "speed" in options.parts:
        speed(options)
    if "curve" in options.parts:
        curves(options)


def speed(options: Options) -> None:
    """Steps of all methods in turns."""
    runs = {method: Run(method, 0, options) for method in options.methods}
    steps: dict[Method, list[Step]] = {method: [] for method in runs}
    for number in range(options.warm_up + options.speed_steps):
        for method, run in runs.items():
            step = run.step()
            print(f"{method}, step {number}: {step}", file=sys.stderr, flush=True)
            if number >= options.warm_up:
                steps[method].append(step)
    memory = {method: run.stop() for method, run in runs.items()}
    print(
        f"\nAgent {options.agent}, {options.questions} questions per optimiser step, {options.rollouts} rollouts per "
        f"question (GRPO), {options.threads} thread(s); medians of {options.speed_steps} steps taken in turns.\n"
    )
    print("| method | actions per step | s per step | s per 1,000 actions | CPU s per 1,000 actions ", end="")
    print("| generate | environment | other rollout | update | peak MiB |\n|---" + 9 * "|---:" + "|")
    for method, taken in steps.items():
        numbers = [median(s.seconds for s in taken), *(median(per_1000(s, name) for s in taken) for name in CLOCKS)]
        cells = [f"{median(s.actions for s in taken):,.0f}", *(f"{number:.2f}" for number in numbers)]
        cells += [*(f"{share:.0%}" for share in shares(taken)), f"{memory[method]:,.0f}"]
        print(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
    if "trl" in steps:
        print("\n| times faster than TRL | per step | per 1,000 actions | per 1,000 actions, CPU time |")
        print("|---|---:|---:|---:|")
        for method, taken in steps.items():
            print(f"| {NAMES[method]} | " + " | ".join(ratios(steps["trl"], taken)) + " |")
    if options.output:
        found = {method: [asdict(step) for step in taken] for method, taken in steps.items()}
        write_json(options.output / "speed.json", {"options": plain(options), "steps": found, "peak_mib": memory})


def per_1000(step: Step, clock: str) -> float:
    """Seconds by a clock per 1,000 actions."""
    return float(1000 * getattr(step, clock) / step.actions)


def shares(steps: Sequence[Step]) -> list[float]:
    """Of generate, environment, other rollout and update in the time of all steps."""
    total = sum(step.seconds for step in steps)
    parts = [sum(getattr(step, name) for step in steps) / total for name in ("generate", "environment", "update")]
    return [*parts[:2], 1 - sum(parts), parts[2]]


def ratios(theirs: Sequence[Step], ours: Sequence[Step]) -> list[str]:
    """How many times our time TRL's is, turn by turn: median and range."""
    pairs = list(zip(theirs, ours, strict=True))
    found = [[t.seconds / o.seconds for t, o in pairs]]
    found += [[per_1000(t, clock) / per_1000(o, clock) for t, o in pairs] for clock in CLOCKS]
    return [f"{median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in found]


def curves(options: Options) -> None:
    """Held-out exact match against actions generated, over seeds."""
    found: dict[Method, list[list[dict[str, float]]]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        for method, runs in found.items():
            runs.append(curve(method, seed, options))
    print(
        f"\nSampled exact match in % on {options.eval_questions} held-out questions (temperature 1), mean of "
        f"{len(options.seeds)} seed(s) and, in brackets, each; seconds are of training alone.\n"
    )
    print("| method | step | actions generated | seconds | EM |\n|---|---:|---:|---:|---|")
    means: dict[str, list[dict[str, float]]] = {}
    for method, runs in found.items():
        for points in zip(*runs, strict=True):
            mean = {name: float(np.mean([point[name] for point in points])) for name in points[0]}
            means.setdefault(NAMES[method], []).append(mean)
            each = ", ".join(f"{100 * point['eval/sampled_em']:.1f}" for point in points)
            cells = (f"{mean['step']:.0f}", f"{mean['actions_generated']:,.0f}", f"{mean['seconds']:,.0f}")
            print(f"| {NAMES[method]} | {' | '.join(cells)} | {100 * mean['eval/sampled_em']:.1f} ({each}) |")
    if options.output:
        learning_curve(means, options.output / "learning_curve.png")


def curve(method: Method, seed: int, options: Options) -> list[dict[str, float]]:
    """One run's evaluations. With an output folder, what was run before with these options is taken from there."""
    path = options.output / f"curve-{method}-{seed}.json" if options.output else None
    asked = {name: value for name, value in plain(options).items() if name not in NO_MATTER}
    if path and path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["options"] == asked:
            return cast(list[dict[str, float]], saved["points"])
    factor = STEPS_FACTOR.get(method, 1)
    run = Run(method, seed, options)
    point = {"step": 0.0, "actions_generated": 0.0, "seconds": 0.0}
    points = [point | run.evaluate()]
    for number in range(1, factor * options.curve_steps + 1):
        step = run.step()
        point["step"] = number
        point["actions_generated"] += step.actions
        point["seconds"] += step.seconds
        if number % (factor * options.eval_every) == 0:
            points.append(point | run.evaluate())
            print(f"{method}, seed {seed}: {points[-1]}", file=sys.stderr, flush=True)
    run.stop()
    if path:
        write_json(path, {"options": asked, "points": points})
    return points


def plain(options: Options) -> dict[str, object]:
    """JSON values by option, as they come back from a file."""
    return cast(dict[str, object], json.loads(json.dumps(asdict(options), default=str)))


class Run:
    """A training run in a process of its own, which does something only when asked to."""

    def __init__(self, method: Method, seed: int, options: Options) -> None:
        self._method = method
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, method, seed, options), daemon=True)
        self._process.start()
        theirs.close()  # so that a child that dies ends our waiting
        self._link.recv()

    def step(self) -> Step:
        """Take an optimiser step."""
        return cast(Step, self._ask("step"))

    def evaluate(self) -> dict[str, float]:
        """Play the held-out questions."""
        return cast(dict[str, float], self._ask("evaluate"))

    def stop(self) -> float:
        """End the process; its peak memory in MiB."""
        peak = cast(float, self._ask("stop"))
        self._process.join()
        return peak

    def _ask(self, what: str) -> object:
        self._link.send(what)
        try:
            return self._link.recv()
        except EOFError as error:
            raise SystemExit(f"{NAMES[self._method]} failed; its own message stands above") from error


def serve(link: Connection, method: Method, seed: int, options: Options) -> None:
    """A child process: start a run, and go on as the parent asks."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    steps = max(options.curve_steps, options.warm_up + options.speed_steps)
    with tempfile.TemporaryDirectory(prefix="trl-comparison-") as folder:
        config = TrainConfig(
            algorithm="grpo" if method == "trl" else method, agent=options.agent, seed=seed, device="cpu",
            rollouts=options.rollouts if method in ("trl", "grpo") else None,
            questions_per_step=options.questions, minibatches=1,
            steps=STEPS_FACTOR.get(method, 1) * steps + 1,  # the last one would also write a checkpoint
            eval_questions=0, eval_every=10**6, save_every=10**6, threads=options.threads,
            output_dir=Path(folder) / "run",
        )  # fmt: skip
        (serve_trl if method == "trl" else serve_ours)(link, config, options)


def serve_ours(link: Connection, config: TrainConfig, options: Options) -> None:
    """Steps of our trainer, its metrics and logging included."""
    trainer = Trainer(config)
    run = trainer.run()
    next(run)
    score = scorer(trainer.agent, config, options)
    link.send("ready")
    while wait_for_step(link, score):
        started, cpu = time.perf_counter(), time.process_time()
        metrics = next(run)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        parts = (metrics["time/sample"], metrics["time/environment"], metrics["time/update"] + metrics["time/sync"])
        link.send(Step(seconds, cpu, *parts, int(metrics["rollout/actions_generated"]), metrics["rollout/reward"]))


def scorer(agent: Agent, config: TrainConfig, options: Options) -> Callable[[], dict[str, float]]:
    """Plays the held-out questions with the agent's present weights: the same code for every method."""
    _, _, task, questions = load_data(replace(config, eval_questions=options.eval_questions))

    def score() -> dict[str, float]:
        agent.sync()  # the weights have changed since
        found = evaluate(task, agent.policy, agent.transcript, questions, temperature=1.0, seed=config.seed)
        agent.sync()
        return {"eval/sampled_em": found.em, "turns": found.turns, "invalid": found.invalid}

    return score


def wait_for_step(link: Connection, score: Callable[[], dict[str, float]]) -> bool:
    """Evaluate as often as the parent asks; True when it wants a step, False when it wants an end."""
    while (asked := link.recv()) == "evaluate":
        link.send(score())
    if asked == "stop":
        link.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return bool(asked == "step")


class TrlRollouts:
    """TRL's `rollout_func`: it gets the ids of questions, each as often as it has rollouts, and plays the episodes."""

    def __init__(self, task: SearchTask, agent: Agent) -> None:
        assert agent.tokenizer is not None
        self._task, self._transcript, self._tokenizer = task, agent.transcript, agent.tokenizer
        self.forget()

    def forget(self) -> None:
        """Count from 0 again."""
        self.seconds = self.generate = self.environment = 0.0
        self.actions = 0
        self.rewards: list[float] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        started = time.perf_counter()
        task, transcript = self._task, self._transcript
        states = [task.initial(task.questions[name]) for name in prompts]
        prompt_ids = [list(transcript.prompt(task.observation(state))) for state in states]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        trained: list[list[int]] = [[] for _ in prompts]  # 1 where the model wrote, 0 where the environment did
        rewards = [0.0] * len(prompts)
        live = list(range(len(prompts)))
        while live:
            sampled, texts = self._generate([prompt_ids[i] + completion_ids[i] for i in live], trainer)
            stepped = time.perf_counter()
            after = task.transition_batch([states[i] for i in live], texts)
            self.actions += len(live)
            going = []
            for i, ids, text, state in zip(live, sampled, texts, after, strict=True):
                rewards[i] += task.reward(states[i], text, state)
                states[i] = state
                completion_ids[i] += ids
                trained[i] += [1] * len(ids)
                if task.terminal(state):
                    continue
                shown = transcript.observation(task.observation(state), ids)
                length = len(prompt_ids[i]) + len(completion_ids[i]) + len(shown)
                if length + MIN_ACTION_TOKENS <= transcript.context:
                    completion_ids[i] += shown
                    trained[i] += [0] * len(shown)
                    going.append(i)
            live = going
            self.environment += time.perf_counter() - stepped
        self.rewards += rewards
        self.seconds += time.perf_counter() - started
        return {
            "prompt_ids": prompt_ids, "completion_ids": completion_ids, "env_mask": trained, "earned": rewards,
            "logprobs": None,  # only used with vLLM
        }  # fmt: skip

    def _generate(self, prefixes: list[list[int]], trainer: Any) -> tuple[list[list[int]], list[str]]:
        """Token ids and texts of an action for each prefix, by TRL's own call of transformers' `generate`."""
        started = time.perf_counter()
        sampled, _ = trainer._generate_single_turn(prefixes, images=None, multimodal_fields={}, num_generations=1)
        eos = self._tokenizer.eos_token_id
        texts = self._tokenizer.batch_decode([ids[:-1] if ids[-1] == eos else ids for ids in sampled])
        self.generate += time.perf_counter() - started
        return sampled, texts


class Turns(transformers.TrainerCallback):
    """Waits for the parent before every step and reports after it."""

    def __init__(self, link: Connection, score: Callable[[], dict[str, float]], rollouts: TrlRollouts) -> None:
        self._link, self._score, self._rollouts = link, score, rollouts
        self._started = self._cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not wait_for_step(self._link, self._score):
            raise SystemExit
        self._rollouts.forget()
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        spent = self._rollouts
        parts = (spent.generate, spent.environment, seconds - spent.seconds)
        self._link.send(Step(seconds, cpu, *parts, spent.actions, float(np.mean(spent.rewards))))


def earned_reward(earned: list[float], **_: Any) -> list[float]:
    """What the rollouts earned in the environment."""
    return earned


def serve_trl(link: Connection, config: TrainConfig, options: Options) -> None:
    """Steps of GRPOTrainer."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    task, pool, _, _ = load_data(config)
    agent = load_agent(config.agent, device="cpu", tools=task.card.tools)
    model, tokenizer = agent.model, agent.tokenizer
    assert model is not None and model.generation_config is not None and tokenizer is not None
    # Transformers looks for single tokens far faster than for stop strings.
    ends = [tokenizer.encode(f"</{tool}>", add_special_tokens=False) for tool in task.card.tools]
    if any(len(end) != 1 for end in ends):
        raise SystemExit(f"{options.agent} has no single tokens for the closing tags; take another --agent")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *(end[0] for end in ends)]
    rollouts = TrlRollouts(task, agent)
    asked = [q.id for step in range(config.steps) for q in take_questions(pool, step, options.questions, config.seed)]
    trainer = GRPOTrainer(
        model,
        reward_funcs=earned_reward,
        train_dataset=Dataset.from_dict({"prompt": asked}),  # `rollout_func` gets this column alone
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[Turns(link, scorer(agent, config, options), rollouts)],
        args=GRPOConfig(
            output_dir=str(config.output_dir), max_steps=config.steps, seed=config.seed, shuffle_dataset=False,
            per_device_train_batch_size=options.trl_batch,
            gradient_accumulation_steps=options.questions * options.rollouts // options.trl_batch,
            num_generations=options.rollouts, max_completion_length=agent.transcript.max_tokens,
            temperature=1.0, top_p=1.0, top_k=0, cache_implementation=options.trl_cache,
            loss_type="dapo", beta=0.0, epsilon=0.2, num_iterations=1, importance_sampling_level="token",
            scale_rewards="group", mask_truncated_completions=False,
            learning_rate=config.learning_rate, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95,
            weight_decay=0.0, max_grad_norm=config.max_grad_norm, gradient_checkpointing=False,
            use_vllm=False, use_cpu=True, bf16=False, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    link.send("ready")
    trainer.train()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
