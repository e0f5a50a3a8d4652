"""Environment steps per second on one core beside gem and SkyRL-gym, as a Markdown table.

    pip install --target LIBS gem-llm skyrl-gym     # a folder of their own: they pin old versions
    PYTHONPATH=LIBS python benchmarks/env_comparison.py

The same episodes in all of them: searches and a wrong answer, over a search tool that always returns the same three
passages, so that what is measured is the environment. Steps include resets; "with snapshot" stores the state after
every step, ours by `get_state`, theirs by `copy.deepcopy` of the environment (gem's data set, which it would copy as
well, is left out of the copy). gem reads its question from a `datasets` table at each reset; a further row shows it
without that. Times are CPU times of the thread, the best of several. What cannot be imported is said, not guessed.
"""

import copy
import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from carl_gym import SearchEnv
from carl_gym.cards import load_card
from carl_gym.envs.cards import EnvCard
from carl_gym.envs.state import Question
from carl_gym.envs.task import SearchTask
from carl_gym.retrieval import Corpus, Passage, Retriever, SearchResults

TURNS = 5
EPISODES = 400
REPEATS = 7
QUESTION = "In which city was the director of the film Golden Desert born?"
TEXT = "{} is a city on the river Cam. It has a university, two theatres and a railway station of the year 1845."
TITLES = ("Old Harbor", "North Ford", "Silver Lake")
SEARCHES = [f"<think>I need the place {i}.</think>\n<search>director of Golden Desert {i}</search>" for i in range(8)]
ANSWER = "<think>That is it.</think>\n<answer>North Ford</answer>"

Play = Callable[[Sequence[str], bool], None]


class Fixed(Retriever):
    """Always the same passages: retrieval that costs nothing."""

    def search(self, queries: Sequence[str], k: int) -> SearchResults:
        return SearchResults([list(self.corpus.ids)] * len(queries), [[1.0] * len(self.corpus)] * len(queries))


def ours() -> tuple[Play, Callable[[], None]]:
    corpus = Corpus(Passage(f"p{i}", title, TEXT.format(title)) for i, title in enumerate(TITLES))
    card = load_card("envs", "HotpotQA-v0", EnvCard, {"turns": 10, "top_k": 3})
    question = Question("q", QUESTION, ("Cambridge",), TITLES[:2])
    env = SearchEnv(SearchTask([question], corpus, Fixed(corpus), card, "three passages"))
    other = SearchEnv(env.task)

    def play(actions: Sequence[str], snapshot: bool) -> None:
        env.reset()
        for action in actions:
            env.step(action)
            if snapshot:
                env.get_state()

    def restore() -> None:
        other.set_state(env.get_state())

    return play, restore


def gem(history: bool, rows_as_list: bool = False) -> tuple[Play, Callable[[], None]]:
    import datasets
    from gem.envs.qa_env import QaEnv
    from gem.tools.search_tool import SearchTool
    from gem.tools.tool_env_wrapper import ToolEnvWrapper
    from gem.wrappers.observation_wrapper import ObservationWrapper

    class FixedSearch(SearchTool):
        # The parent's formatting of the server's reply, without the server.
        def _search(self, query: str) -> str:
            return str(self._passages2string(reply))

    reply = [{"document": {"contents": f'"{title}"\n{TEXT.format(title)}'}} for title in TITLES]
    datasets.disable_progress_bars()
    questions = datasets.Dataset.from_dict({"question": [QUESTION] * 64, "answer": ["Cambridge"] * 64})
    base = QaEnv(dataset=questions)
    if rows_as_list:
        base.dataset = SimpleRows(dict(row) for row in base.dataset)
    env: Any = ToolEnvWrapper(base, [FixedSearch(search_url="unused")])
    if history:
        env = ObservationWrapper(env, include_action=True, include_chat_template=False)

    def play(actions: Sequence[str], snapshot: bool) -> None:
        env.reset()
        for action in actions:
            env.step(action)
            if snapshot:
                copy.deepcopy(env, {id(base.dataset): base.dataset})

    def restore() -> None:
        copy.deepcopy(env, {id(base.dataset): base.dataset})

    return play, restore


class SimpleRows(list[Any]):
    """A list that QaEnv can use as its data set."""

    def shuffle(self, seed: int) -> "SimpleRows":
        return self


def skyrl() -> tuple[Play, Callable[[], None]]:
    from skyrl_gym.envs.search.env import SearchEnv as SkyRLSearchEnv
    from skyrl_gym.tools import search as search_module

    contents = [{"document": {"contents": f'"{title}"\n{TEXT.format(title)}'}, "score": 1.0} for title in TITLES]

    def fixed(*_: object, **__: object) -> tuple[dict[str, Any], None]:
        return {"result": [contents]}, None

    search_module.call_search_api = fixed
    config = SimpleNamespace(search_url="http://127.0.0.1:1/retrieve", topk=3, timeout=1, log_requests=False)
    extras = {"reward_spec": {"ground_truth": {"target": ["Cambridge"]}}, "max_turns": 10}
    prompt = [{"role": "user", "content": QUESTION}]
    latest: list[Any] = []

    def snapshot_of(env: Any) -> None:
        # The tools hold a connection pool with locks, which every copy shares.
        shared = (env.tool_group, env.tool_groups)
        copy.deepcopy(env, {id(part): part for part in shared})

    def play(actions: Sequence[str], snapshot: bool) -> None:
        env = SkyRLSearchEnv(config, extras)
        env.init(prompt)
        for action in actions:
            env.step(action)
            if snapshot:
                snapshot_of(env)
        latest[:] = [env]

    def restore() -> None:
        snapshot_of(latest[0])

    return play, restore


def steps_per_second(play: Play, snapshot: bool) -> float:
    episodes = [[SEARCHES[(e + t) % len(SEARCHES)] for t in range(TURNS - 1)] + [ANSWER] for e in range(EPISODES)]
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        for actions in episodes:
            play(actions, snapshot)
        times.append(time.thread_time() - start)
    return EPISODES * TURNS / min(times)


def microseconds(function: Callable[[], None], times: int = 2000) -> float:
    """Median over single calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter_ns()
        function()
        found.append(time.perf_counter_ns() - start)
    return median(found) / 1000


def main() -> None:
    print("| environment | steps/s | steps/s with snapshot | snapshot + restore, us (median) |\n|---|---:|---:|---:|")
    rivals: dict[str, Callable[[], tuple[Play, Callable[[], None]]]] = {
        "carl-gym SearchEnv": ours,
        "gem QaEnv + search tool": lambda: gem(history=False),
        "gem, its data set replaced by a list": lambda: gem(history=False, rows_as_list=True),
        "gem + history": lambda: gem(history=True),
        "SkyRL-gym search": skyrl,
    }
    for name, make in rivals.items():
        try:
            play, restore = make()
        except ImportError as error:
            print(f"| {name} | not measured: {error} | | |")
            continue
        bare, stored = steps_per_second(play, False), steps_per_second(play, True)
        play(SEARCHES[: TURNS - 1], False)  # a state of four turns to copy
        print(f"| {name} | {bare:,.0f} | {stored:,.0f} | {microseconds(restore):,.1f} |")


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    main()
