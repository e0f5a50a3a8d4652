"""The actions that are being sampled together: what of their prefixes is computed, and one token more for each.

A prefix is prefilled up to its last token, which the first step decodes: so a fork, whose prefix is cached to the end,
joins without a prefill. Actions of one and the same prefix (siblings) are one row until after that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from carl_gym.agents import prefill
from carl_gym.agents.draws import Temperatures, draw, uniforms
from carl_gym.agents.kv_cache import PrefixCache
from carl_gym.agents.kv_rows import Block, KvRows, Part
from carl_gym.agents.policy import FinishReason, SampleRequest

PASS_TOKENS = 4096
"""Most prefix tokens that go through the model at once, unless one prefix has more: this bounds their activations."""
BLOCK_BYTES = {"cpu": 500_000, "cuda": 50_000_000}
"""What a block of rows costs a layer's attention, as the bytes of keys and values that it could read instead."""


@dataclass(slots=True, eq=False)
class Slot:
    """An action under way."""

    number: int
    request: SampleRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish: FinishReason = "length"


@dataclass(slots=True, eq=False)
class _Rows:
    """A block and the slot that each of its rows in use decodes; None once it is complete.

    `followers` are siblings, and the row that they will be copied from after its first step.
    """

    block: Block
    slots: list[Slot | None]
    followers: list[tuple[int, Slot]]


@dataclass(slots=True)
class Counters:
    """Tokens since the policy was made.

    Attributes:
        prompt_tokens: in the prefixes that were asked for.
        computed_tokens: of those, what went through the model. There is no padding.
        decode_steps: passes that computed one token per row.
        decoded_tokens: sampled.
    """

    prompt_tokens: int = 0
    computed_tokens: int = 0
    decode_steps: int = 0
    decoded_tokens: int = 0


class DecodeBatch:
    """Rows that are decoded together, each at its own length.

    Args:
        model: used in place.
        cache: where prefixes are looked up, and kept with their actions.
    """

    def __init__(self, model: PreTrainedModel, cache: PrefixCache) -> None:
        self.model = model
        self.cache = cache
        self.counters = Counters()
        self._kv = KvRows(model)
        self._all: list[_Rows] = []
        self._next: _Step | None = None
        self._law: _Law | None = None

    @property
    def slots(self) -> list[Slot | None]:
        """What the rows of a step are of, in its order."""
        return [slot for rows in self._all for slot in rows.slots]

    @property
    def size(self) -> int:
        """Number of actions under way."""
        return sum(slot is not None for slot in self.slots) + sum(len(rows.followers) for rows in self._all)

    def clear(self) -> None:
        """Abandon everything and forget what was computed."""
        self._kv.clear()
        self._all = []
        self._next = self._law = None

    def release(self) -> None:
        """Free the memory. Nothing may be under way."""
        self._kv.release()

    # Joining

    def admit(self, slots: Sequence[Slot]) -> None:
        """Have slots join, with their prefixes computed."""
        siblings: dict[tuple[int, ...], list[Slot]] = {}
        for slot in slots:
            siblings.setdefault(tuple(slot.request.prefix), []).append(slot)
        families = sorted(siblings.items(), key=lambda family: _room(*family))
        self._prefill([prefix for prefix, _ in families], self._place(families))
        self._next = self._law = None
        self.counters.prompt_tokens += sum(len(prefix) * len(family) for prefix, family in families)
        self.counters.computed_tokens += len(families)  # the last tokens, in the first step

    def _place(self, families: Sequence[tuple[tuple[int, ...], list[Slot]]]) -> list[tuple[Block, int]]:
        """Block and row of each family; it has room for the siblings as well."""
        per_block = BLOCK_BYTES.get(self.model.device.type, BLOCK_BYTES["cuda"]) / self._kv.bytes_per_place
        rooms = [_room(*family) for family in families]
        ends = prefill.cut(rooms, per_block) if self._kv.packs else [len(families)]
        places, start = [], 0
        for end in ends:
            part = [family for _, family in families[start:end]]
            block = self._kv.lend(sum(map(len, part)), rooms[end - 1])
            followers = [(row, slot) for row, family in enumerate(part) for slot in family[1:]]
            self._all.append(_Rows(block, [family[0] for family in part], followers))
            places += [(block, row) for row in range(len(part))]
            start = end
        return places

    def _prefill(self, prefixes: Sequence[tuple[int, ...]], places: Sequence[tuple[Block, int]]) -> None:
        """Fill rows with keys and values of all but the last token of their prefixes."""
        heads = [prefix[:-1] for prefix in prefixes]
        rows = [self._kv.rows(block)[:, :, row] for block, row in places]
        starts = []
        for row, tokens in zip(rows, heads, strict=True):
            found, pieces = self.cache.find(tokens)
            done = 0
            for piece in pieces:
                row[:, :, :, done : (done := done + piece.shape[2])] = piece.transpose(2, 3)
            starts.append(found)
        for runs in _passes(prefill.plan(heads, starts)):
            self._compute([(run, *places[run.prefix]) for run in runs], heads)
            for run in runs:
                for other in run.others:
                    rows[other][:, :, :, run.start : run.stop] = rows[run.prefix][:, :, :, run.start : run.stop]
        for row, tokens, start in zip(rows, heads, starts, strict=True):
            if start < len(tokens):
                self._keep(tokens, row, start)

    def _compute(self, runs: Sequence[tuple[prefill.Run, Block, int]], prefixes: Sequence[tuple[int, ...]]) -> None:
        parts: list[Part] = []
        ids: list[int] = []
        positions, firsts, rooms = [], [], []
        for run, block, row in runs:
            count = run.stop - run.start
            start = block.start + row * block.room
            parts.append(Part(start, 1, block.room, count, run.stop))
            ids += prefixes[run.prefix][run.start : run.stop]
            positions.append(np.arange(run.start, run.stop))
            firsts += [start] * count
            rooms += [block.room] * count
        self.counters.computed_tokens += len(ids)
        at = np.concatenate(positions)
        self._kv.forward(parts, self._tensor(np.array(ids)), self._tensor(at), self._places(firsts, rooms, at))

    def _places(self, firsts: Sequence[int], rooms: Sequence[int], positions: np.ndarray) -> torch.Tensor:
        """Where keys and values of tokens go (tokens, heads), by start and room of the row and position in it."""
        heads = np.arange(self._kv.heads)
        starts = np.array(firsts)[:, None] * len(heads)
        return self._tensor(starts + np.array(rooms)[:, None] * heads + positions[:, None])

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.model.device)

    def _keep(self, tokens: Sequence[int], row: torch.Tensor, start: int) -> None:
        """Remember keys and values from `start` on of a row, which begins with `tokens`."""
        self.cache.insert(tokens, row[:, :, :, start : len(tokens)].transpose(2, 3), start)

    # Decoding

    def step(self) -> tuple[list[int], list[float], list[float]]:
        """A token, its log-prob and the entropy of its distribution for each of `slots`, as they are after the call.

        Those of a None mean nothing. The last list is empty where no request asked for entropies.
        """
        step: _Step | None = self._next or self._arrange()
        assert step is not None
        step.mask.index_fill_(0, step.mask_places, 0.0)
        hidden = self._kv.forward(step.parts, step.ids, step.positions, step.places)
        logits = self.model.get_output_embeddings()(hidden)
        if any(rows.followers for rows in self._all):
            logits = logits[self._tensor(np.array(self._join_followers()))]
            step = None
        slots = self.slots
        if self._law is None:
            self._law = _Law.of(slots, logits.device)
        law = self._law
        indices = np.array([len(slot.tokens) if slot else 0 for slot in slots])
        drawn, logprobs, entropies = draw(
            logits, law.temperatures, uniforms(law.seeds, indices), entropies=law.entropies
        )
        self.counters.decode_steps += 1
        self.counters.decoded_tokens += sum(slot is not None for slot in slots)
        if step is not None:
            step.advance(drawn)
        self._next = step
        return drawn.tolist(), logprobs, entropies

    def _arrange(self) -> _Step:
        """The next step of all rows."""
        parts, ids, lengths, firsts, rooms = [], [], [], [], []
        for rows in self._all:
            block, live = rows.block, [slot for slot in rows.slots if slot is not None]
            size = len(rows.slots)
            # A complete row that is still among the others computes something of no use at its place 0.
            own = [_length(slot) if slot else 0 for slot in rows.slots]
            ids += [_last(slot) if slot else 0 for slot in rows.slots]
            even = len({_length(slot) for slot in live}) == 1
            parts.append((Part(block.start, size, block.room, 1, max(own) + 1), even))
            firsts += [block.start + row * block.room for row in range(size)]
            rooms += [block.room] * size
            lengths += own
        at, stride = np.array(lengths), np.array(rooms)
        mask_starts = np.cumsum(stride) - stride
        mask = np.full(int(stride.sum()), -np.inf, dtype=np.float32)
        for first, length in zip(mask_starts.tolist(), lengths, strict=True):
            mask[first : first + length] = 0.0
        flat = self._tensor(mask).to(self.model.dtype)
        used = 0
        for part, even in parts:
            if not even:
                part.mask = flat[used : used + part.rows * part.room].view(part.rows, 1, part.room)
            used += part.rows * part.room
        return _Step(
            [part for part, _ in parts],
            self._tensor(np.array(ids)),
            self._tensor(at),
            self._places(firsts, rooms, at),
            flat,
            self._tensor(mask_starts + at),
            torch.ones(len(ids), dtype=torch.long, device=flat.device),
        )

    def _join_followers(self) -> list[int]:
        """Siblings become rows of their own. Returns which row each row was, or was a sibling of."""
        order, before = [], 0
        for rows in self._all:
            size, leaders = len(rows.slots), [leader for leader, _ in rows.followers]
            order += [before + row for row in (*range(size), *leaders)]
            before += size
            if leaders:
                kv = self._kv.rows(rows.block)
                length = max(_length(slot) for slot in rows.slots if slot) + 1
                kv[:, :, size : size + len(leaders), :, :length] = kv[:, :, leaders, :, :length]
                rows.slots += [slot for _, slot in rows.followers]
                rows.followers = []
        self._law = None
        return order

    def drop(self, done: Sequence[int]) -> None:
        """These entries of `slots` are complete: keep what was computed of them, and decode them no longer."""
        if self._next is not None:
            self._next.stop(self._tensor(np.array(done)))
        first = 0
        for rows in self._all:
            here = [i - first for i in done if 0 <= i - first < len(rows.slots)]
            first += len(rows.slots)
            if not here:
                continue
            kv = self._kv.rows(rows.block)
            for row in here:
                slot = rows.slots[row]
                assert slot is not None
                # The last token's keys and values were never computed.
                self._keep([*slot.request.prefix, *slot.tokens[:-1]], kv[:, :, row], len(slot.request.prefix) - 1)
                rows.slots[row] = None
            if self._close_ranks(rows, kv):
                self._next = self._law = None
        self._all = [rows for rows in self._all if rows.slots]

    def _close_ranks(self, rows: _Rows, kv: torch.Tensor) -> bool:
        """Move rows into the places of complete ones, once these are so many that it pays; whether it did."""
        left = [(row, slot) for row, slot in enumerate(rows.slots) if slot is not None]
        if 4 * len(left) > 3 * len(rows.slots):
            return False
        holes = [row for row in range(len(left)) if rows.slots[row] is None]
        if holes:
            movers = left[len(left) - len(holes) :]
            length = max(_length(slot) for _, slot in movers)
            kv[:, :, holes, :, :length] = kv[:, :, [row for row, _ in movers], :, :length]
            for hole, (_, slot) in zip(holes, movers, strict=True):
                rows.slots[hole] = slot
        del rows.slots[len(left) :]
        if not left:
            self._kv.give_back(rows.block)
        return True


@dataclass(frozen=True, slots=True, eq=False)
class _Law:
    """How the tokens of the rows are drawn; the same at every step until rows come or go.

    Attributes:
        seeds: (rows,) uint64.
        temperatures: of the rows.
        entropies: whether any request asks for entropies.
    """

    seeds: np.ndarray
    temperatures: Temperatures
    entropies: bool

    @classmethod
    def of(cls, slots: Sequence[Slot | None], device: torch.device) -> _Law:
        """Of these rows; a None is drawn somehow."""
        seeds = np.array([slot.request.seed % 2**64 if slot else 0 for slot in slots], dtype=np.uint64)
        temperatures = Temperatures([slot.request.temperature if slot else 1.0 for slot in slots], device)
        return cls(seeds, temperatures, any(slot is not None and slot.request.entropies for slot in slots))


@dataclass(slots=True, eq=False)
class _Step:
    """What goes through the model next, one token for each row: (rows,) or (rows, heads) tensors.

    `mask` has a stretch of its room for each row, with zeros at what the row sees; `mask_places` is where it grows.
    """

    parts: list[Part]
    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor
    mask_places: torch.Tensor
    grows: torch.Tensor

    def advance(self, ids: torch.Tensor) -> None:
        """Make it the step after, with these tokens."""
        self.ids = ids
        self.positions += self.grows
        self.places += self.grows.unsqueeze(1)
        self.mask_places += self.grows
        for part in self.parts:
            part.visible = min(part.visible + 1, part.room)

    def stop(self, rows: torch.Tensor) -> None:
        """These rows are complete, and grow no longer; they step back, since the next place may be another row's."""
        self.grows.index_fill_(0, rows, 0)
        self.positions[rows] -= 1
        self.places[rows] -= 1
        self.mask_places[rows] -= 1


def _length(slot: Slot) -> int:
    """Number of tokens whose keys and values are there before the next step."""
    return len(slot.request.prefix) + len(slot.tokens) - 1


def _last(slot: Slot) -> int:
    """The token that the next step computes."""
    return slot.tokens[-1] if slot.tokens else slot.request.prefix[-1]


def _room(prefix: Sequence[int], siblings: Sequence[Slot]) -> int:
    """Positions that a row needs: the last token of an action is never computed."""
    return len(prefix) - 1 + max(slot.request.max_tokens for slot in siblings)


def _passes(runs: Sequence[prefill.Run]) -> list[list[prefill.Run]]:
    """Runs that go through the model together, in order: of one wave, and not too many tokens."""
    passes: list[list[prefill.Run]] = []
    tokens = 0
    for run in sorted(runs, key=lambda run: run.wave):
        count = run.stop - run.start
        if not passes or passes[-1][0].wave != run.wave or tokens + count > PASS_TOKENS:
            passes.append([])
            tokens = 0
        passes[-1].append(run)
        tokens += count
    return passes
