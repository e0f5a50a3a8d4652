"""The search task: questions, a corpus, a retriever and a card as a pure transition function over `EnvState`s.

This is the environment; `gym_env.SearchEnv` is its Gymnasium shell, and the collector calls it directly.
Nothing here changes after construction but memos: an observation, a reward or a next state depends on its
arguments alone. Observation texts are made from the state and the corpus, so a state needs no texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypedDict

from carl_gym.envs.cards import EnvCard
from carl_gym.envs.pages import Memo, ruler
from carl_gym.envs.protocol import CODES, escape, function_schemas, hint, parse, unescape
from carl_gym.envs.rewards import NO_ANSWER, Outcome, find_reward
from carl_gym.envs.scoring import agreement
from carl_gym.envs.state import (
    SCHEMA_VERSION,
    EnvState,
    ParsedAction,
    Question,
    Status,
    Tally,
    Turn,
    make_state,
    with_tally,
)
from carl_gym.errors import ActionError, DataError, RetrievalError, StateError
from carl_gym.retrieval.corpus import Corpus, Passage, title_key
from carl_gym.retrieval.retriever import Retriever

NO_HITS = "No passage matches this search."
NO_TITLE = "No passage has this title. Use a title from the search results."
NO_PAGE = "No passage is open. Open one by its title first."
NO_MORE_PAGES = "There is no further page."
LAST_TURN = "This is the last turn: answer now with <answer>text</answer>."

MEMO_CHARS = 1 << 25
"""Most characters of rendered passages that a task keeps, and most page starts."""

Message = dict[str, str]


class ParsedActionInfo(TypedDict):
    """The last action as the environment understood it."""

    kind: str
    argument: str
    code: str


class Info(TypedDict):
    """What `SearchTask.info` tells about a state: JSON types only, nothing that the agent is shown.

    Keys:
        question_id: which question the episode is about.
        source: what data was loaded; scores mean nothing without it.
        status: `running`, `answered` or `out_of_turns`.
        turns: actions so far.
        turns_left: actions left.
        invalid_actions: malformed or refused actions so far.
        repeated_queries: searches so far whose query had been made before, refused ones included.
        em, f1, cover_em, format: the parts of rewards so far (see `rewards.Outcome`).
        gold_title_recall: share of the supporting titles that searches or accesses brought up; None where
            the data names no supporting titles.
        gold_title_opened: share of them that were opened by access; None as above.
        parsed_action: the last action; None at the start.
    """

    question_id: str
    source: str
    status: str
    turns: int
    turns_left: int
    invalid_actions: int
    repeated_queries: int
    em: float
    f1: float
    cover_em: float
    format: float
    gold_title_recall: float | None
    gold_title_opened: float | None
    parsed_action: ParsedActionInfo | None


class SearchTask:
    """Answer questions by searching and opening passages.

    Args:
        questions: at least one, with unique ids; their order is kept.
        corpus: the passages.
        retriever: searches that corpus.
        card: tools, budgets, text lengths, rules and the reward.
        source: what was loaded, for `info` and reports.
        is_mini: the data is a small stand-in; scores must not be reported under the data set's name.

    Raises:
        DataError: no questions, or two with one id.
        CardError: a reward or tokenizer that cannot be loaded.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        corpus: Corpus,
        retriever: Retriever,
        card: EnvCard,
        source: str,
        is_mini: bool = False,
    ) -> None:
        self.questions = {question.id: question for question in questions}
        if not questions or len(self.questions) != len(questions):
            problem = "two questions have the same id" if questions else "there are no questions"
            raise DataError(f"{source}: {problem}")
        self.corpus = corpus
        self.retriever = retriever
        self.card = card
        self.source = source
        self.is_mini = is_mini
        self._card_hash = card.hash
        self._fingerprint = corpus.fingerprint
        self._turns = card.turns
        self._tools = card.tools
        self.has_rules = card.repeated_query == "refuse" or card.last_turn == "answer"
        """Whether the card refuses some well-formed actions; see `refusal`."""
        self._reward = find_reward(card.reward, card.id)
        self._ruler = ruler(card.tokenizer)
        self._results: Memo[str, tuple[str, str]] = Memo(MEMO_CHARS)
        self._pages: Memo[tuple[str, int], str] = Memo(MEMO_CHARS)
        self._page_starts: Memo[str, tuple[int, ...]] = Memo(MEMO_CHARS)
        self._gold: dict[str, dict[str, int]] = {}
        self._outcome: Outcome | None = None

    @property
    def label(self) -> str:
        """The name that scores may be reported under: never the data set's for the mini set."""
        return f"mini set in place of {self.card.id}" if self.is_mini else self.card.id

    @property
    def tools(self) -> list[dict[str, object]]:
        """The card's tools as OpenAI function schemas."""
        return function_schemas(self._tools)

    def initial(self, question: Question) -> EnvState:
        """The state in which `question` has been asked and nothing done."""
        return make_state(question.id, (), "running", self._card_hash, self._fingerprint, (), Tally(question))

    def transition(self, state: EnvState, action: str) -> EnvState:
        """The state after `action`, whatever text it is. Errors as for `transition_batch`."""
        parsed = self._understand(state, action)
        if parsed.kind == "search":
            return self._next(state, Turn(parsed, self._search([parsed.argument])[0]))
        return self._next(state, self._turn(state.turns, parsed))

    def transition_batch(self, states: Sequence[EnvState], actions: Sequence[str]) -> list[EnvState]:
        """The states after one action each; all searches go to the retriever in one call.

        Raises:
            StateError: a state is terminal or belongs to another environment.
            ActionError: an action is not a str.
            RetrievalError: the search failed.
        """
        parsed = [self._understand(state, action) for state, action in zip(states, actions, strict=True)]
        queries = [action.argument for action in parsed if action.kind == "search"]
        hits = iter(self._search(queries) if queries else ())
        return [
            self._next(state, Turn(action, next(hits)) if action.kind == "search" else self._turn(state.turns, action))
            for state, action in zip(states, parsed, strict=True)
        ]

    def refusal(self, state: EnvState, action: ParsedAction) -> str:
        """The code with which the card's rules refuse a valid action in a state; "" where they do not."""
        return self._refused(action, len(state.turns), self._tally(state).queries)

    def observation(self, state: EnvState) -> str:
        """The text that is new in `state`: the question at the start, then what the last action brought up.

        Results and hints stand in `<information>`; after an answer there is nothing to read. Texts of
        documents and questions are escaped and can forge neither a tag nor a control token, nor a result line.
        """
        return self._shown(state.question_id, state.turns)

    def messages(self, state: EnvState) -> tuple[Message, ...]:
        """The same as chat messages: one of the role `user`, or none where there is nothing to read."""
        text = self.observation(state)
        return ({"role": "user", "content": text},) if text else ()

    def transcript(self, state: EnvState) -> list[tuple[ParsedAction | None, str]]:
        """The episode so far: each action as understood with the observation that it brought; None comes with the
        question."""
        id, turns = state.question_id, state.turns
        return [
            (turns[n - 1].action if n else None, self._shown(id, turns[:n])) for n in range(len(turns) + 1)
        ]  # fmt: skip

    def reward(self, state: EnvState, action: str, next_state: EnvState) -> float:
        """The card's reward on the transition that ends an episode, 0 on every other one; less the penalty for an
        invalid action.

        Raises:
            ConfigError: a reward of one's own returned something that is no finite number.
            DataError: the reward needs supporting titles, and the question names none.
        """
        reward = self._reward(self.score(next_state)) if next_state.status != "running" == state.status else 0.0
        if self.card.invalid_penalty and next_state.turns and next_state.turns[-1].action.kind == "invalid":
            reward -= self.card.invalid_penalty
        return reward

    def terminal(self, state: EnvState) -> bool:
        """Whether the episode is over: answered, or out of turns."""
        return state.status != "running"

    def score(self, state: EnvState) -> Outcome:
        """How the episode went so far."""
        known = self._outcome
        if known is not None and known.state is state:  # the reward and the info of a step ask for the same one
            return known
        tally = self._tally(state)
        titles = len(tally.question.supporting_titles)
        question = tally.question
        answer = state.turns[-1].action.argument if state.status == "answered" else None
        self._outcome = outcome = Outcome(
            question,
            state,
            answer,
            NO_ANSWER if answer is None else agreement(answer, question.answers),
            tally.invalid,
            tally.found.bit_count() / titles if titles else None,
        )
        return outcome

    def info(self, state: EnvState) -> Info:
        """Measurements of the episode so far, for people and logs: never shown to an agent."""
        question, invalid, repeated, found, opened, _ = self._tally(state)
        turns = state.turns
        count = len(turns)
        titles = len(question.supporting_titles)
        em = f1 = cover_em = 0.0
        if state.status == "answered":
            em, f1, cover_em = self.score(state).agreement
        last: ParsedActionInfo | None = None
        if turns:
            kind, argument, code = turns[-1].action
            last = {"kind": kind, "argument": argument, "code": code}
        return {
            "question_id": state.question_id,
            "source": self.source,
            "status": state.status,
            "turns": count,
            "turns_left": self._turns - count,
            "invalid_actions": invalid,
            "repeated_queries": repeated,
            "em": em,
            "f1": f1,
            "cover_em": cover_em,
            "format": (count - invalid) / count if count else 0.0,
            "gold_title_recall": found.bit_count() / titles if titles else None,
            "gold_title_opened": opened.bit_count() / titles if titles else None,
            "parsed_action": last,
        }

    def validate(self, state: EnvState) -> EnvState:
        """`state`, if this task could have made it.

        Raises:
            StateError: it comes from another card, corpus, data set or schema version, or contradicts itself.
        """
        self._check_origin(state)
        question = self.questions.get(state.question_id)
        if question is None:
            raise StateError(f"the state's question {state.question_id!r} is not among the questions of {self.source}")
        if state.tally is not None and state.tally.question is question:
            return state  # only `_next` makes tallies
        queries: list[str] = []
        for n, turn in enumerate(state.turns):
            self._check_turn(state.turns[:n], turn, queries)
            if turn.action.kind == "search":
                queries.append(turn.action.argument.casefold())
        ended_early = any(turn.action.kind == "answer" for turn in state.turns[:-1])
        if ended_early or len(state.turns) > self._turns or state.status != self._status(state.turns):
            raise StateError(
                f"the state's status {state.status!r} contradicts its {len(state.turns)} turns (the budget is "
                f"{self._turns}); pass a state exactly as an environment gave it"
            )
        return state

    # --- transitions --------------------------------------------------------------------------------------------------

    def _understand(self, state: EnvState, action: str) -> ParsedAction:
        """What an action means in a state, by the protocol and by the card's rules."""
        if state.card != self._card_hash or state.corpus != self._fingerprint or state.schema != SCHEMA_VERSION:
            self._check_origin(state)
        if state.status != "running":
            raise StateError(f"the episode is over (status {state.status!r}); start a new one before acting")
        if not isinstance(action, str):
            raise ActionError(f"an action is a str such as '<search>query</search>', not {type(action).__name__}")
        parsed = parse(action, self._tools)
        if self.has_rules and (code := self.refusal(state, parsed)):
            return ParsedAction("invalid", "", code)
        return parsed

    def _refused(self, parsed: ParsedAction, turns: int, queries: Sequence[str]) -> str:
        """`refusal` after so many turns and these queries."""
        kind, argument, _ = parsed
        if kind == "answer" or kind == "invalid":
            return ""
        if turns == self._turns - 1 and self.card.last_turn == "answer":
            return "must_answer"
        if kind == "search" and self.card.repeated_query == "refuse" and argument.casefold() in queries:
            return "repeated_query"
        return ""

    def _search(self, queries: Sequence[str]) -> list[tuple[str, ...]]:
        found = self.retriever.search(queries, self.card.top_k).ids
        if len(found) != len(queries):
            raise RetrievalError(f"the retriever gave {len(found)} results for {len(queries)} queries")
        return list(map(tuple, found))

    def _turn(self, before: tuple[Turn, ...], action: ParsedAction) -> Turn:
        """The turn of an action that needs no search."""
        if action.kind == "access":
            return Turn(action, self._opened(before, action.argument))
        if action.kind == "read" and (last := _last_opened(before)):
            id, page = last.passage_ids[0], last.page + 1
            if page < len(self._starts(self._passage(id))):
                return Turn(action, (id,), page)
        return Turn(action)

    def _opened(self, before: tuple[Turn, ...], name: str) -> tuple[str, ...]:
        """The passage that an access names: by a title as shown, which may be escaped, or by id.

        Passages may share a title. The one that the latest search with this title showed, best first, is meant; where
        none did, the corpus' first.
        """
        titles = {title_key(name), title_key(unescape(name))}
        for turn in reversed(before):
            if turn.action.kind == "search":
                for id in turn.passage_ids:
                    title = (self._results.get(id) or self._result(id))[0]
                    if title_key(title) in titles or title_key(_line(title)) in titles:
                        return (id,)
        passage = self.corpus.by_title(name) or self.corpus.by_title(unescape(name))
        return (passage.id,) if passage else (name,) if name in self.corpus else ()

    def _next(self, state: EnvState, turn: Turn) -> EnvState:
        turns = (*state.turns, turn)
        status: Status = "running"
        if turn.action.kind == "answer":
            status = "answered"
        elif len(turns) >= self._turns:
            status = "out_of_turns"
        tally = self._count(self._tally(state), turn)
        return make_state(state.question_id, turns, status, state.card, state.corpus, state.extras, tally)

    def _status(self, turns: tuple[Turn, ...]) -> Status:
        if turns and turns[-1].action.kind == "answer":
            return "answered"
        return "out_of_turns" if len(turns) >= self._turns else "running"

    # --- counting -----------------------------------------------------------------------------------------------------

    def _tally(self, state: EnvState) -> Tally:
        """The state's tally; counted over its whole history where it has none, as after a restore."""
        question = self.questions[state.question_id]
        tally = state.tally
        if tally is None or tally.question is not question:
            tally = Tally(question)
            for turn in state.turns:
                tally = self._count(tally, turn)
            with_tally(state, tally)
        return tally

    def _count(self, tally: Tally, turn: Turn) -> Tally:
        """The tally after one more turn."""
        question, invalid, repeated, found, opened, queries = tally
        (kind, argument, code), ids, _ = turn
        if kind == "invalid":
            return Tally(question, invalid + 1, repeated + (code == "repeated_query"), found, opened, queries)
        if kind == "search":
            query = argument.casefold()
            repeated += query in queries
            queries = (*queries, query)
        if ids and question.supporting_titles:
            bits, results = self._gold.get(question.id) or self._bits(question), self._results.get
            for id in ids:
                if (title := (results(id) or self._result(id))[0]) in bits:
                    found |= bits[title]
                    if kind != "search":
                        opened |= bits[title]
        return Tally(question, invalid, repeated, found, opened, queries)

    def _bits(self, question: Question) -> dict[str, int]:
        """The bits of each supporting title in a tally."""
        bits: dict[str, int] = {}
        for n, title in enumerate(question.supporting_titles):
            bits[title] = bits.get(title, 0) | 1 << n
        self._gold[question.id] = bits
        return bits

    # --- texts --------------------------------------------------------------------------------------------------------

    def _shown(self, question_id: str, turns: tuple[Turn, ...]) -> str:
        """The observation after these turns."""
        warn = self.card.last_turn == "answer" and len(turns) == self._turns - 1
        if not turns:
            text = _indented(escape(self.questions[question_id].text))
            return f"{text}\n{LAST_TURN}" if warn else text
        action, ids, page = turns[-1]
        kind = action.kind
        if kind == "answer":
            return ""
        if kind == "invalid":
            text = hint(action.code, self._tools)
        elif kind == "search":
            results = self._results.get
            text = _numbered(len(ids))(*[(results(id) or self._result(id))[1] for id in ids]) or NO_HITS
        elif ids:
            text = self._page(ids[0], page)
        else:
            text = NO_TITLE if kind == "access" else NO_MORE_PAGES if _last_opened(turns) else NO_PAGE
        return (
            f"<information>\n{text}\n{LAST_TURN}\n</information>" if warn else f"<information>\n{text}\n</information>"
        )

    def _passage(self, id: str) -> Passage:
        try:
            return self.corpus[id]
        except KeyError as error:
            raise RetrievalError(f"passage {id!r} was found, but the corpus of {self.source} lacks it") from error

    def _result(self, id: str) -> tuple[str, str]:
        """A passage's title, and its line in search results without the rank."""
        known = self._results.get(id)
        if known is not None:
            return known
        passage = self._passage(id)
        snippet = self._ruler.shorten(passage.text, self.card.snippet_length)
        line = f"(Title: {_line(passage.title)}) {_line(snippet)}".rstrip()
        return self._results.keep(id, (passage.title, line), len(line) + len(passage.title))

    def _page(self, id: str, page: int) -> str:
        known = self._pages.get((id, page))
        if known is not None:
            return known
        passage = self._passage(id)
        if "read" not in self._tools:
            text, footer = self._ruler.shorten(passage.text, self.card.page_length), ""
        else:
            starts = (*self._starts(passage), len(passage.text))
            text, pages = passage.text[starts[page] : starts[page + 1]].strip(), len(starts) - 1
            footer = f"\n(page {page + 1} of {pages}{'; read shows the next' if page + 1 < pages else ''})"
            footer = footer if pages > 1 else ""
        # On the title's line, after a space, the text tokenises as it does in a search result.
        shown = f"Doc(Title: {_line(passage.title)}) {_indented(escape(text))}{footer}"
        return self._pages.keep((id, page), shown, len(shown))

    def _starts(self, passage: Passage) -> tuple[int, ...]:
        """Where the passage's pages begin."""
        known = self._page_starts.get(passage.id)
        if known is not None:
            return known
        starts = self._ruler.page_starts(passage.text, self.card.page_length)
        return self._page_starts.keep(passage.id, starts, len(starts))

    # --- checking -----------------------------------------------------------------------------------------------------

    def _check_origin(self, state: EnvState) -> None:
        if state.card == self._card_hash and state.corpus == self._fingerprint and state.schema == SCHEMA_VERSION:
            return
        what, theirs, ours = (
            ("schema version", str(state.schema), str(SCHEMA_VERSION))
            if state.schema != SCHEMA_VERSION
            else ("card", state.card, self._card_hash)
            if state.card != self._card_hash
            else ("corpus", state.corpus, self._fingerprint)
        )
        raise StateError(
            f"the state was made with another {what} ({theirs or 'none'}; this environment has {ours}); "
            "restore it in an environment made with the same card, overrides and data"
        )

    def _check_turn(self, before: tuple[Turn, ...], turn: Turn, queries: Sequence[str]) -> None:
        """Raise StateError unless the turn could follow these, in which these queries were made."""
        (kind, argument, code), ids, page = turn
        for id in ids:
            if id not in self.corpus:
                raise StateError(f"the state mentions passage {id!r}, which the corpus of {self.source} lacks")
        valid = kind in self._tools and code == "ok" and bool(argument) == (kind != "read")
        refused = kind == "invalid" and code in CODES and not argument
        if not (valid or refused):
            raise StateError(f"the state has an unknown action (kind {kind!r}, argument {argument!r}, code {code!r})")
        broken = self._refused(turn.action, len(before), queries)
        rules = {
            "must_answer": self.card.last_turn == "answer" and len(before) == self._turns - 1,
            "repeated_query": self.card.repeated_query == "refuse" and bool(queries),
        }
        if broken or not rules.get(code, True):
            raise StateError(
                f"the state's {kind} turn {len(before) + 1} goes against the rules of this environment "
                f"({broken or code}); pass a state exactly as an environment gave it"
            )
        expected = Turn(turn.action, ids[: self.card.top_k]) if kind == "search" else self._turn(before, turn.action)
        if turn != expected:
            raise StateError(
                f"the state's {kind} turn {len(before) + 1} shows page {page} of {', '.join(ids) or 'nothing'}, which "
                "this environment would not have shown; pass a state exactly as an environment gave it"
            )


def _last_opened(turns: tuple[Turn, ...]) -> Turn | None:
    """The last turn that showed a page of a passage."""
    for turn in reversed(turns):
        if turn.passage_ids and turn.action.kind in ("access", "read"):
            return turn
    return None


@functools.cache
def _numbered(lines: int) -> Callable[..., str]:
    """What puts so many lines of search results together, numbered. (Far quicker than numbering them every time.)"""
    return "\n".join(f"Doc {n}{{}}" for n in range(1, lines + 1)).format


def _line(text: str) -> str:
    return escape(" ".join(text.split()))


def _indented(text: str) -> str:
    """Every line but the first behind a space: no line of a passage or question passes for one of the environment."""
    lines = text.splitlines()
    return "\n ".join(lines) if len(lines) > 1 else text
