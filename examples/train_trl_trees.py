"""CARL-Lite on MiniWiki inside TRL's trainer: our rollout trees, credit and loss; TRL's optimiser, schedule and launch.

    python examples/train_trl_trees.py
    accelerate launch --cpu examples/train_trl_trees.py
    torchrun --nproc_per_node 2 examples/train_trl_trees.py  # the same step, shared (accelerate wants MPI for that)

The agent `tiny` comes with the package. Any algorithm without a critic can be named, and any agent with a model.
"""

from __future__ import annotations

import argparse
import os
import tempfile

from transformers import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig

import carl_gym
from carl_gym.adapters.trl_trees import CarlTrainer
from carl_gym.agents.agent import load_agent


def main() -> None:
    """Train, and print what every step earned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="carl-lite")
    parser.add_argument("--agent", default="tiny", help="agent card, model folder or hub id")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps")
    parser.add_argument("--questions", type=int, default=8, help="questions, and so trees, per optimiser step")
    parser.add_argument("--rows", type=int, default=24, help="most rows per question; its trajectories are enough")
    parser.add_argument("--micro-batches", type=int, default=4, help="parts of an optimiser step in each process")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))  # accelerate and torchrun set it
    parts = processes * args.micro_batches
    if args.questions * args.rows % parts:
        parser.error(f"{args.questions} questions of {args.rows} rows cannot be split into {parts} equal micro-batches")
    task = carl_gym.make_task("carl/MiniWiki-v0", questions=max(500, args.questions))
    with tempfile.TemporaryDirectory() as folder:
        trainer = CarlTrainer(
            load_agent(args.agent, device="cpu", tools=task.card.tools),
            task,
            args.algorithm,
            args=GRPOConfig(
                output_dir=folder, max_steps=args.steps, seed=args.seed, num_generations=args.rows,
                per_device_train_batch_size=args.questions * args.rows // parts,
                gradient_accumulation_steps=args.micro_batches, learning_rate=args.learning_rate,
                lr_scheduler_type="constant", adam_beta2=0.95, use_cpu=True, bf16=False, gradient_checkpointing=False,
                report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
            ),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    print(f"{trainer.accelerator.num_processes} process(es), {trainer.state.log_history[-1]['train_runtime']:.0f} s")
    for entry in trainer.state.log_history:
        if "reward" in entry:
            actions, rows = entry["rollout/actions_generated"], entry["rollout/rows"]
            print(
                f"step {entry['step']}: reward {entry['reward']:.3f}, {actions:.0f} actions, {rows:.0f} rows, "
                f"gradient norm {entry['grad_norm']:.6f}"
            )


if __name__ == "__main__":
    main()
