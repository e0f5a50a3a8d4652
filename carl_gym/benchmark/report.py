"""The report of a benchmark: Markdown tables of what its records say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from carl_gym.benchmark.aggregates import crossed_interval, iqm, iqm_of_runs, run_interval
from carl_gym.benchmark.plan import Plan
from carl_gym.benchmark.records import Record, Records, machines
from carl_gym.benchmark.results import ArmResult, Paired, compare_with

MIN_RUNS_FOR_IQM = 4
"""With fewer, the interquartile mean is the mean."""
COUNTS = {
    "actions generated": "actions_generated",
    "actions trained": "actions_trained",
    "tokens trained": "tokens_trained",
    "tokens through updates": "tokens_processed",
    "optimiser steps": "optimiser_steps",
}
"""Columns of the main table -> columns of the records."""
UNSAID = ("steps", "save_every", "threads")
"""Options that are the same for all arms and change no result where a budget of actions ends the run."""


def provenance(plan: Plan, records: Sequence[Record], command: str) -> str:
    """How the results came about: command, code, machine, and what all arms have in common."""
    commits = Counter(" then ".join(record.commit.split(", ")) for record in records)
    made = ", ".join(f"{commit} ({count} runs)" for commit, count in commits.most_common()) or "none yet"
    unsaid = UNSAID if plan.shared.get("max_actions") is not None else ()
    shared = ", ".join(
        f"{name} = {_plain(value)}" for name, value in plan.shared.items() if name not in unsaid and value != ()
    )
    lines = [
        f"- Command: `{command}`",
        f"- Commit: {made}" + (" (+: with uncommitted changes)" if "+" in made else ""),
        f"- Machine: {'; '.join(machines(records)) or 'none yet'}",
        f"- All arms: {shared}",
    ]
    if plan.searches:
        searched = ", ".join(f"{name} = {_plain(value)}" for name, value in plan.search.items())
        lines.append(
            f"- Learning rate: the best mean final sampled EM over seeds {_plain(plan.search_seeds)}, out of "
            f"{_plain([f'{rate:g}' for rate in plan.rates])}; the search has {searched}"
        )
    return "\n".join(lines)


def main_table(results: Sequence[ArmResult]) -> str:
    """A row per arm with at least one finished run; before them, the agent that all start from."""
    rows = []
    done = [result for result in results if result.runs]
    if done:
        first = [record for result in done for record in result.runs.values()]
        before = [np.mean([record.column(name)[0] for record in first]) for name in ("sampled_em", "greedy_em")]
        f1 = np.mean([record.column("sampled_f1")[0] for record in first])
        rows.append(["before training", "", "", _percent(before[0]), "", _percent(before[1]), _percent(f1), *[""] * 7])
    for result in done:
        scores, runs, choice = result.scores("sampled_em"), result.last("sampled_em"), result.choice
        greedy = result.scores("greedy_em")
        middle = f"{_percent(iqm(runs))} {_interval(*run_interval(runs, iqm_of_runs))}"
        rows.append(
            [
                result.arm.name,
                f"{choice.rate:g}{'*' if choice.at_edge else ''}" if choice else "",
                f"{len(result.runs)}" + (f" of {result.seeds}" if len(result.runs) < result.seeds else ""),
                f"{_percent(scores.mean())} {_interval(*crossed_interval(scores))}",
                middle if len(runs) >= MIN_RUNS_FOR_IQM else "",
                f"{_percent(greedy.mean())} {_interval(*crossed_interval(greedy))}",
                _percent(result.last("sampled_f1").mean()),
                *(_count(result.last(name).mean()) for name in COUNTS.values()),
                *(_minutes(result.last(name).mean()) for name in ("seconds", "cpu_seconds")),
            ]
        )
    scored = ["EM sampled [95 %]", "IQM of runs [95 %]", "EM greedy [95 %]", "F1 sampled"]
    text = _table(["arm", "learning rate", "seeds", *scored, *COUNTS, "minutes", "CPU minutes"], rows)
    if any(result.choice and result.choice.at_edge for result in done):
        text += "\n\n\\* the best learning rate is the smallest or largest that was tried: a better one may lie beyond."
    return text


def paired_table(pairs: Sequence[Paired]) -> str:
    """A row per arm that is compared with a reference."""
    rows = [
        [
            pair.arm,
            str(len(pair.seeds)),
            _signed(pair.difference, pair.low, pair.high),
            _signed(pair.greedy, pair.greedy_low, pair.greedy_high),
            "-" if math.isnan(pair.at_budget) else f"{100 * pair.at_budget:+.1f}",
            _p(pair.p),
            _p(pair.p_seeds),
            _p(pair.p_holm),
            f"{pair.probability:.2f} [{pair.probability_low:.2f}, {pair.probability_high:.2f}]",
        ]
        for pair in pairs
    ]
    head = [
        "arm", "common seeds", "EM sampled, difference [95 %]", "EM greedy, difference [95 %]",
        "sampled, at equal actions", "p, these runs", "p, other seeds", "p, other seeds (Holm)",
        "probability of improvement [95 %]",
    ]  # fmt: skip
    return _table(head, rows)


def efficiency_table(results: Sequence[ArmResult], budget: float) -> str:
    """Sampled EM at shares of the budget of generated actions, on the line between evaluations."""
    shares = (0.25, 0.5, 0.75, 1.0)
    rows = [
        [result.arm.name, *(_percent(result.at(share * budget)) for share in shares)]
        for result in results
        if result.runs
    ]
    return _table(["arm", *(f"{share * budget:,.0f} actions" for share in shares)], rows)


def rates_table(results: Sequence[ArmResult], rates: Sequence[float]) -> str:
    """What the search found."""
    rows = []
    for result in results:
        choice = result.choice
        if choice is None:
            rows.append([result.arm.name, *["-"] * len(rates), "not finished"])
        elif choice.scores and choice.source == result.arm.name:
            chosen = f"{choice.rate:g}" + (", at the edge" if choice.at_edge else "")
            rows.append([result.arm.name, *(_percent(choice.scores[rate]) for rate in sorted(rates)), chosen])
        else:
            source = f"that of {choice.source}" if choice.source else "given"
            rows.append([result.arm.name, *[""] * len(rates), f"{choice.rate:g}, {source}"])
    return _table(["arm", *(f"{rate:g}" for rate in sorted(rates)), "chosen"], rows)


def full_report(
    plan: Plan,
    records: Records,
    results: Sequence[ArmResult],
    *,
    references: Sequence[str],
    command: str,
    figures: Iterable[str],
) -> str:
    """The whole page.

    Args:
        plan: the grid.
        records: what is finished.
        results: of the arms.
        references: arms to compare the others with; those that are not there are left out.
        command: that makes the results again.
        figures: file names of the pictures, beside the page.
    """
    used = [record for result in results for record in result.runs.values()]
    used += [r for arm in plan.arms for cell in plan.search_cells(arm) if (r := records.get(cell)) is not None]
    done = sum(records.get(cell) is not None for cell in plan.cells(records.score))
    finished = [result for result in results if result.runs]
    count = plan.shared.get("curve_questions")
    which = f", on the first {count} questions" if count is not None else ""
    parts = ["# Algorithms side by side", provenance(plan, used, command)]
    if done < plan.size():
        parts.append(f"**Not finished: {done} of {plan.size()} cells.**")
    parts.append(
        "## Held-out scores\n\nMeans over seeds and questions at the end of training, in %. Intervals of EM: bootstrap "
        "over seeds and questions; of the interquartile mean: over seeds. Actions, tokens, steps and minutes are means "
        "over seeds; minutes are those of rollouts and updates, tokens through updates those of learning alone. The "
        "last two steps of a run are made as small as what is left of its budget, so it overruns by little: see "
        "actions generated. Before training: on the questions of the curves."
    )
    budget = plan.shared.get("max_actions")
    budget = budget if isinstance(budget, int) else None
    parts.append(main_table(results))
    by_name = {result.arm.name: result for result in results}
    for name in references:
        if name in by_name and (pairs := compare_with(by_name[name], results, budget)):
            parts.append(
                f"## Against {name}\n\nIn points, paired by question and seed. At equal actions: less what each run "
                "gained beyond the budget, by the curves. p, these runs: permutation test over the questions, each "
                "with the mean over the seeds; a run that was lucky counts as a better algorithm there. p, other "
                "seeds: paired t test over the seeds; with Holm's correction for the rows of the table. The intervals "
                "are over seeds and questions, that of the probability that a run is better over seeds (all of both "
                "arms): with 3 to 5 it is too narrow and covers 80 to 90 % instead of 95."
            )
            parts.append(paired_table(pairs))
    if budget is not None and finished:
        parts += [f"## At a part of the budget\n\nSampled EM in %{which}.", efficiency_table(results, budget)]
    if plan.searches:
        parts += ["## Learning rates\n\nSampled EM in % by rate, mean over the search seeds."]
        parts += [rates_table(results, plan.rates)]
    pictures = [f"![{name}]({name})" for name in figures]
    if pictures:
        parts += ["## Curves\n\nMeans over seeds; bands: 95 % bootstrap intervals over seeds" + which + ".", *pictures]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _percent(share: float | np.floating) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _minutes(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds / 60:.1f}"


def _signed(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
