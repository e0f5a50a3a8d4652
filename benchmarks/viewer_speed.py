"""How large the page of a rollout tree is, and how long it takes to open and to use, as a Markdown table.

    python benchmarks/viewer_speed.py [--leaves 24] [--turns 32] [--repeats 5]

The tree is made up: `--leaves` trajectories of `--turns` actions that part in their first quarter. Either every
observation is another passage of `--passage-tokens` tokens, which is the worst case, or a search brings three of 300.
"open" is Chromium's time from the start of the navigation (a file on the disk) to the frame after the one that shows
the tree, "click" that of a click on the last state of a trajectory until its transcript is laid out. Medians of
`--repeats` and, in brackets, the slowest, in a browser that has been started before.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import tyro

from carl_gym.agents.policy import Completion
from carl_gym.algorithms.credit import tree_difference
from carl_gym.algorithms.selection import forked_states
from carl_gym.envs.state import EnvState, ParsedAction, Question, Turn
from carl_gym.rollouts.tree import RolloutTree
from carl_gym.tracking import show

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-device-scale-factor=1",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure the size and the speed of the rollout-tree viewer."""

    leaves: int = 24
    """Trajectories."""
    turns: int = 32
    """Actions of each."""
    passage_tokens: int = 500
    """Tokens of a passage."""
    repeats: int = 5
    """Times that each page is opened."""


@dataclass
class Words:
    """A tokenizer whose tokens are words with the space before them."""

    words: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)

    def encode(self, text: str) -> tuple[int, ...]:
        found = re.findall(r"\s?\S+|\s", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.ids]
        self.ids |= {word: i for i, word in enumerate(self.words[len(self.ids) :], len(self.ids))}
        return tuple(self.ids[word] for word in found)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


def made_up_tree(
    words: Words, *, leaves: int = 24, turns: int = 32, passage_tokens: int = 500, distinct: bool = True, seed: int = 0
) -> RolloutTree:
    """A tree of search agents whose forks lie in the first quarter of the trajectories."""
    rng = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ren", "tas", "vel", "dor", "in", "el", "sha", "qui", "bran", "tor", "ne", "ul"]
    names = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(4000)]

    def prose(count: int) -> str:
        return " ".join(rng.choices(names, k=count)).capitalize() + "."

    def passage() -> str:
        return f"(Title: {prose(2)[:-1].title()}) {prose(passage_tokens)}"

    pool = [passage() for _ in range(1 if distinct else 300)]
    question = Question("made-up", f"Who wrote the {prose(9)[:-1].lower()}?", ("Brandor Quinel",))
    tree = RolloutTree(question, 3)
    prompt = words.encode(f"Answer the question by searching.\nQuestion: {question.text}\n")
    root = tree.add_root(EnvState(question.id), prompt)
    for trajectory in range(leaves):
        early = [node.id for node in tree.nodes if 0 < node.depth <= turns // 4 and node.children]
        at = rng.choice(early) if early else root
        while tree.nodes[at].depth < turns:
            last = tree.nodes[at].depth == turns - 1
            kind = "answer" if last else rng.choices(("search", "access", "read"), (5, 3, 2))[0]
            argument = "" if kind == "read" else prose(2 if last else 4)[:-1]
            thought = words.encode(f"<think>{prose(rng.randint(8, 30))}</think> <{kind}>{argument}</{kind}>")
            surprise = rng.expovariate(6.0)
            logprobs = tuple(-rng.expovariate(1.0) * surprise for _ in thought)
            shown = (
                "\n".join(f"Doc {n}{text}" for n, text in enumerate(rng.sample(pool, 3), 1))
                if not distinct and kind == "search"
                else f"Doc{passage() if distinct else rng.choice(pool)}"
            )
            observation = () if last else words.encode(f"\n<information>\n{shown}\n</information>\n")
            turn = Turn(ParsedAction(kind, argument))  # type: ignore[arg-type]
            state = EnvState(question.id, (*tree.nodes[at].state.turns, turn), "answered" if last else "running")
            action = Completion(thought, logprobs, words.decode(thought), "stop")
            reward = float(rng.random() < 0.4) + 0.1 if last else 0.0
            at = tree.add_child(at, action, state, observation, reward, last, False, trajectory)
    return tree


def credited(tree: RolloutTree) -> SimpleNamespace:
    """With CARL's credit and selection."""
    (advantages,), (selected,) = tree_difference([tree]), forked_states([tree])
    return SimpleNamespace(tree=tree, advantages=np.asarray(advantages), selected=np.asarray(selected))


def main(options: Options) -> int:
    """Print the table; 1 without a browser."""
    if reason := missing():
        print(f"viewer_speed {reason}", file=sys.stderr)
        return 1
    print("| passages | actions | page, MB | open, ms | click, ms |\n|---|---:|---:|---:|---:|---:|")
    with chromium() as browser, TemporaryDirectory() as folder:
        for name, distinct in (("another one every time", True), ("three of 300 per search", False)):
            words = Words()
            tree = made_up_tree(
                words,
                leaves=options.leaves,
                turns=options.turns,
                passage_tokens=options.passage_tokens,
                distinct=distinct,
            )
            path = show(credited(tree), decode=words.decode).save(Path(folder) / "tree.html")
            times = []
            for _ in range(options.repeats):
                browser.get(path.as_uri())
                times.append(browser.execute_async_script(MEASURE))
            opened, used = (f"{median(column):,.0f} ({max(column):,.0f})" for column in zip(*times, strict=True))
            size = path.stat().st_size / 1e6
            print(f"| {name} | {tree.actions_generated} | {size:.2f} | {opened} | {used} |", flush=True)
    return 0


def missing() -> str:
    """Why no browser can be started here; "" if one can."""
    try:
        import selenium.webdriver  # noqa: F401
    except ImportError:
        return "needs the package selenium"
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        return "needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    return ""


@contextmanager
def chromium(width: int = 1440, height: int = 900) -> Iterator[Chrome]:
    """A browser with an empty profile, whose console and requests can be read (`get_log`)."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (*QUIET, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = Chrome(options, ChromeService(shutil.which("chromedriver")))  # named, so selenium looks for none
        try:
            # The window's own parts count into its size.
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            yield driver
        finally:
            driver.quit()


MEASURE = """
const done = arguments[0], page = document.documentElement.dataset;
const wait = () => {
  if (!page.drawn) return setTimeout(wait, 20);
  const before = performance.now(), states = document.querySelectorAll("#tree [role=treeitem]");
  states[states.length - 1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
  document.getElementById("transcript").getBoundingClientRect();
  done([Number(page.drawn), performance.now() - before]);
};
wait();
"""

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
