"""What a training run will need: memory, tokens, hours. Arithmetic alone; no model is loaded.

    ModelShape + Workload + Hardware --plan--> figures, each with where its number comes from

In the formulas P is parameters, T the mean actions of a rollout, N0 and N CARL's rollouts and forks, L layers, h the
hidden size, q, k and i the widths of queries, keys and MLP. A GB is 10^9 bytes. The paper is arXiv 2512.04949.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from carl_gym.cards import bounded
from carl_gym.errors import ConfigError

GB = 1e9
FLOAT32, BFLOAT16 = 4, 2
"""Bytes."""
LOGITS, LOGIT_BYTES = 1 << 24, 24
"""Most logits at a time (`logprob_model.CHUNK`), and bytes of each, assumed: one bfloat16 and five float32 copies."""
PASSAGES, E5_WIDTH = 21_015_324, 768
"""Of wiki-18, and of a vector of E5-base (retrieval_index/wiki18-*.toml)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder as Llama and Qwen are built: grouped queries, gated MLP.

    Attributes:
        parameters: all, a tied head counted once.
        layers: blocks.
        hidden: width of the residual stream.
        kv_heads: heads of keys and values.
        vocabulary: rows of the embedding.
        heads: heads of queries; 0 for hidden / head_dim.
        head_dim: width of a head.
        intermediate: width of the MLP; 0 for 4 x hidden, which is assumed.
        tied: whether head and embedding are one matrix.
    """

    parameters: int = bounded(1, 1e14)
    layers: int = bounded(1, 10_000)
    hidden: int = bounded(1, 1_000_000)
    kv_heads: int = bounded(1, 10_000)
    vocabulary: int = bounded(1, 1e8)
    heads: int = bounded(0, 10_000, 0)
    head_dim: int = bounded(1, 10_000, 128)
    intermediate: int = bounded(0, 1e7, 0)
    tied: bool = False


SHAPES = {
    "Qwen/Qwen2.5-3B-Instruct": ModelShape(3_085_938_688, 36, 2048, 2, 151_936, 16, 128, 11_008, True),
    "Qwen/Qwen2.5-7B-Instruct": ModelShape(7_615_616_512, 28, 3584, 4, 152_064, 28, 128, 18_944),
    "Qwen/Qwen3-4B": ModelShape(4_022_468_096, 36, 2560, 8, 151_936, 32, 128, 9728, True),
    "meta-llama/Llama-3.2-3B-Instruct": ModelShape(3_212_749_824, 28, 3072, 8, 128_256, 24, 128, 8192, True),
}
"""The models of the cards in agents/, from their config.json, so that planning needs no network."""


class Gpu(NamedTuple):
    """A kind of GPU: memory in GB, dense bfloat16 TFLOP/s, memory bandwidth in GB/s."""

    memory: float
    tflops: float
    bandwidth: float


GPUS = {
    "a100": Gpu(80, 312, 2039),
    "h100": Gpu(80, 989, 3350),
    "h200": Gpu(141, 989, 4800),
    "rtx4090": Gpu(24, 165, 1008),
}
"""From NVIDIA's data sheets: SXM versions, without sparsity."""


def _assumed(default: float, source: str = "assumed") -> Any:
    """A field that says where its default is from."""
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True)
class Workload:
    """What a run does."""

    questions: int = _assumed(128, "the paper, Qwen2.5")
    """Questions per step."""
    initial: int = _assumed(8, "the paper")
    """N0, rollouts from the root."""
    forks: int = _assumed(16, "the paper")
    """N, forks per question."""
    forks_per_round: int = _assumed(1, "the paper")
    """Forks of a tree at once."""
    steps: int = _assumed(100, "the paper")
    """Training steps."""
    turns: float = _assumed(5.0, "the paper: 80.9 actions in 16 rollouts of at most 10")
    """T, mean actions of a rollout."""
    prompt_tokens: int = _assumed(500)
    """Tokens before the first action."""
    action_tokens: int = _assumed(200)
    """Mean tokens of an action, thinking included."""
    observation_tokens: int = _assumed(250, "assumed: 5 hits of 160 characters, or a page of 1,200, at 4 a token")
    """Mean tokens of an observation."""
    context: int | None = field(default=None, metadata={"source": "the agent's card, or given"})
    """Longest prefix plus action; the agent card's, unless given."""
    batch_tokens: int = _assumed(8192, "train_carl.py")
    """Most tokens of a micro-batch in the update."""
    search_seconds: float = _assumed(0.1)
    """Between an action and its observation."""

    def __post_init__(self) -> None:
        _check_positive(self, at_least={"turns": 1})
        if self.context and self.full_length > self.context:
            raise ConfigError(
                f"a rollout of {self.turns:g} turns has {self.full_length:,.0f} tokens, more than a context of "
                f"{self.context:,}; lower turns, action_tokens or observation_tokens, or raise context"
            )

    @property
    def turn_tokens(self) -> int:
        """An action and its observation."""
        return self.action_tokens + self.observation_tokens

    @property
    def full_length(self) -> float:
        """Tokens of a rollout."""
        return self.prompt_tokens + self.turns * self.turn_tokens

    @property
    def mean_length(self) -> float:
        """Tokens before an action, on average over a rollout."""
        return self.prompt_tokens + self.turns / 2 * self.turn_tokens

    @property
    def actions(self) -> float:
        """Generated per question: a fork starts in the middle of a rollout, on average."""
        return self.turns * self.initial + self.turns / 2 * self.forks


@dataclass(frozen=True)
class Hardware:
    """What a run has. Learner and servers take turns: nothing overlaps."""

    gpus: int = _assumed(8)
    """GPUs of the learner."""
    server_gpus: int = _assumed(8)
    """GPUs that vLLM serves from."""
    tensor_parallel: int = _assumed(1, "vLLM's default")
    """GPUs per vLLM server."""
    gpu: Literal["a100", "h100", "h200", "rtx4090"] = field(default="h100", metadata={"source": "assumed"})
    """Kind of GPU."""
    memory: float | None = None
    """GB per GPU; the kind's, unless given."""
    tflops: float | None = None
    """Dense bfloat16 TFLOP/s of a GPU; the kind's, unless given."""
    bandwidth: float | None = None
    """Memory bandwidth of a GPU in GB/s; the kind's, unless given."""
    utilisation: float = _assumed(0.4)
    """Share of the FLOP/s that updates and prefills reach."""
    decode_utilisation: float = _assumed(0.5)
    """Share of the bandwidth that decoding reaches."""
    server_memory: float = _assumed(0.92, "vLLM 0.32's --gpu-memory-utilization")
    """Share of the memory that vLLM takes."""
    disk: float = _assumed(1.0)
    """GB/s of the folder through which servers read weights."""

    def __post_init__(self) -> None:
        _check_positive(self)
        for name in ("utilisation", "decode_utilisation", "server_memory"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is a share and must be at most 1, not {getattr(self, name):g}")
        if self.server_gpus % self.tensor_parallel:
            raise ConfigError(
                f"{self.server_gpus} server_gpus cannot be split into servers of {self.tensor_parallel}; make it a "
                "multiple of tensor_parallel"
            )

    @property
    def device(self) -> Gpu:
        """The kind of GPU, with what was given in its place."""
        given = {name: value for name in Gpu._fields if (value := getattr(self, name)) is not None}
        return GPUS[self.gpu]._replace(**given)

    @property
    def servers(self) -> int:
        """Number of vLLM servers."""
        return self.server_gpus // self.tensor_parallel


class Figure(NamedTuple):
    """A number of a plan, with its unit and where it comes from."""

    section: str
    name: str
    value: float | str
    unit: str
    source: str


def plan(shape: ModelShape, work: Workload, hardware: Hardware, source: str) -> list[Figure]:
    """Everything about a run, inputs first.

    Args:
        shape: the model.
        work: what is done per step.
        hardware: GPUs.
        source: where the shape comes from.

    Raises:
        ConfigError: the context is not known, or a server cannot hold the model.
    """
    if work.context is None:
        raise ConfigError("the longest prefix plus action is not known for this model; pass --context")
    return [
        *_inputs(shape, work, hardware, source),
        *learner_memory(shape, work, hardware),
        *server_memory(shape, work, hardware),
        *step_work(work),
        *duration(shape, work, hardware),
        *wiki18(),
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def block_bytes(shape: ModelShape) -> int:
    """What a block keeps for the way back, in bytes per token: float32 residuals and norms, the rest in bfloat16.

    26 h (two residuals and two norms of 4 bytes, five inputs of projections of 2), 4 q + 4 k (attention), 8 i (gated
    MLP). Counted on transformers' Llama and Qwen2 under autocast; tests/test_plan.py compares it with autograd.
    """
    queries, keys, width = _widths(shape)
    return 26 * shape.hidden + 4 * queries + 4 * keys + 8 * width


def activation_bytes(shape: ModelShape, tokens: int, checkpointing: bool) -> int:
    """Of all blocks, in bytes, for a micro-batch; with checkpointing their inputs alone, and one block at a time."""
    if checkpointing:
        return tokens * (shape.layers * FLOAT32 * shape.hidden + block_bytes(shape))
    return tokens * shape.layers * block_bytes(shape)


def kv_bytes(shape: ModelShape) -> int:
    """Keys and values of one token in bfloat16, in bytes."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BFLOAT16


def gathered_bytes(shape: ModelShape) -> int:
    """What a GPU holds unsharded at a time under FSDP2, in bytes, with parameters put together in bfloat16.

    Embedding and head, two blocks (one computes, the next one is fetched), and gradients of the ends and of one block,
    in bfloat16 and once more in float32 where they are added up.
    """
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    block = max(0, shape.parameters - ends) // shape.layers
    return BFLOAT16 * (ends + 2 * block) + (BFLOAT16 + FLOAT32) * (ends + block)


def learner_memory(shape: ModelShape, work: Workload, hardware: Hardware) -> list[Figure]:
    """Peak memory of a GPU that trains, with weights and optimiser in float32 and the forward pass in bfloat16."""
    p, gpus, memory = shape.parameters, hardware.gpus, hardware.device.memory
    tokens = max(work.batch_tokens, work.context or 0)
    copies, gathered = BFLOAT16 * p, gathered_bytes(shape)
    buckets = FLOAT32 * p if gpus > 1 else 0
    head = LOGIT_BYTES * min(LOGITS, tokens * shape.vocabulary)
    kept, again = (activation_bytes(shape, tokens, checkpointing) for checkpointing in (False, True))
    shard = 1 / gpus
    peaks = {"DDP": (16 * p + buckets, copies, FLOAT32 * p), "FSDP2": (16 * p * shard, gathered, FLOAT32 * p * shard)}
    figures: list[tuple[str, float, str, str]] = [
        ("weights, gradients, AdamW", 16 * p / GB, "GB", "(4 + 4 + 8) P, docs/results-speed.md; FSDP2 divides by GPUs"),
        ("DDP: buckets", buckets / GB, "GB", "4 P with several GPUs: a second copy of the gradients"),
        ("DDP: weights in bfloat16", copies / GB, "GB", "2 P: autocast's copies, kept until a forward pass ends"),
        ("FSDP2: unsharded", gathered / GB, "GB", "8 bytes x (embedding, head) + 10 x a block: weights, gradients"),
        ("FSDP2: to sample from", FLOAT32 * p / GB, "GB", "4 P, with --backend transformers only; not in the peaks"),
        ("tokens of a micro-batch", tokens, "", "the larger of batch_tokens and context: a longer row stands alone"),
        ("activations", kept / GB, "GB", "tokens x L (26 h + 4 q + 4 k + 8 i), tests/test_plan.py"),
        ("activations, checkpointed", again / GB, "GB", "tokens x (4 L h + one block)"),
        ("log-probs", head / GB, "GB", "24 bytes (assumed) x 2^24 logits at a time, agents/logprob_model.py"),
    ]
    for name, (state, in_pass, temporaries) in peaks.items():
        for label, activations in (("not checkpointed", kept), ("checkpointed", again)):
            peak = (state + max(in_pass + activations + head, temporaries)) / GB
            verdict = f"{'fits into' if peak < memory else 'DOES NOT FIT into'} {memory:g} GB"
            source = f"{verdict}: states + the larger of a pass and AdamW's 4 P of temporaries"
            figures.append((f"{name}, {label}: peak", peak, "GB", source))
    return [Figure("Learner, per GPU", *figure) for figure in figures]


def server_memory(shape: ModelShape, work: Workload, hardware: Hardware) -> list[Figure]:
    """Memory of a vLLM server's GPUs, and how many rollouts its cache holds."""
    room, width = _cache_tokens(shape, hardware), hardware.tensor_parallel
    wanted = work.questions * work.initial / hardware.servers
    figures: list[tuple[str, float, str, str]] = [
        ("weights", BFLOAT16 * shape.parameters / width / GB, "GB", "2 P / tensor_parallel"),
        ("cache", room * kv_bytes(shape) / width / GB, "GB", "server_memory x memory - weights; upper: no overhead"),
        ("keys and values of a token", kv_bytes(shape) / 1000, "kB", "2 L kv_heads head_dim x 2 bytes"),
        ("rollouts of full context that fit", room / (work.context or 1), "", "cache of a server / context"),
        ("rollouts that fit", room / work.mean_length, "", "cache / mean length; prefixes that are shared count again"),
        ("rollouts at once, at first", wanted, "", "questions x N0 / servers"),
        ("rollouts at once, forks", _forks_at_once(work, hardware), "", "questions x forks_per_round / servers"),
    ]
    return [Figure("vLLM server, per GPU or server", *figure) for figure in figures]


# --- work and time ----------------------------------------------------------------------------------------------------


def step_work(work: Workload) -> list[Figure]:
    """Actions and tokens of a step."""
    q = work.questions
    trained = 2 * work.forks * q
    figures = [
        ("actions generated", q * work.actions, "questions x (T N0 + T/2 N): the paper's estimate"),
        ("tokens generated", q * work.actions * work.action_tokens, "actions x action_tokens"),
        ("tokens prefilled", prefill_tokens(work), "questions x prompt + actions x observation_tokens: prefix caching"),
        ("actions trained, at most", trained, "2 N a question (the paper: 32.0 with N0 = 8, 30.5 with N0 = 1)"),
        ("tokens trained, at most", trained * work.action_tokens, "of these actions; others are dropped"),
        ("tokens through the update, at most", update_tokens(work), "every token of a tree once: questions x prompt + "
         "actions x (action + observation); what trains nothing is left out"),
        ("the same as full rows", q * (work.initial + work.forks) * work.full_length, "(N0 + N) rollouts, each whole"),
    ]  # fmt: skip
    return [Figure("Per step", name, value, "", source) for name, value, source in figures]


def prefill_tokens(work: Workload) -> float:
    """Tokens per step that the servers read and do not generate."""
    return work.questions * (work.prompt_tokens + work.actions * work.observation_tokens)


def update_tokens(work: Workload) -> float:
    """Tokens per step that go through the update, each token of a tree once; an upper bound."""
    return work.questions * (work.prompt_tokens + work.actions * work.turn_tokens)


def decode_seconds(shape: ModelShape, work: Workload, hardware: Hardware, rollouts: float) -> float:
    """One more token for each of so many rollouts on a server: weights and cache are read, or the FLOPs take longer.

    Rollouts that do not fit into the cache wait for those that do.
    """
    device, width = hardware.device, hardware.tensor_parallel
    fit = max(1.0, _cache_tokens(shape, hardware) // work.mean_length)
    at_once = min(rollouts, fit)
    read = BFLOAT16 * shape.parameters + at_once * work.mean_length * kv_bytes(shape)
    reading = read / (width * device.bandwidth * GB * hardware.decode_utilisation)
    computing = at_once * 2 * shape.parameters / (width * device.tflops * 1e12 * hardware.utilisation)
    return math.ceil(rollouts / fit) * max(reading, computing)


def update_flops(shape: ModelShape, work: Workload) -> float:
    """Per token with checkpointing: two forward passes and a backward pass of twice one, attention included."""
    queries, _, _ = _widths(shape)
    forward = 2 * shape.parameters + 4 * shape.layers * queries * work.mean_length
    return 4 * forward


def duration(shape: ModelShape, work: Workload, hardware: Hardware) -> list[Figure]:
    """Seconds of a step and hours of the run, without evaluations and checkpoints."""
    flops = hardware.device.tflops * 1e12 * hardware.utilisation
    rounds = math.ceil(work.forks / work.forks_per_round)
    first = work.turns * work.action_tokens
    later = rounds * work.turns / 2 * work.action_tokens
    at_first = work.questions * work.initial / hardware.servers
    parts = [
        ("first rollouts", first * decode_seconds(shape, work, hardware, at_first),
         "T x action_tokens decoding steps, each max(bytes / bandwidth, FLOPs)"),
        ("forks", later * decode_seconds(shape, work, hardware, _forks_at_once(work, hardware)),
         "N / forks_per_round rounds, one after another, of T/2 x action_tokens steps"),
        ("prefill", prefill_tokens(work) * 2 * shape.parameters / (hardware.server_gpus * flops), "2 P FLOPs a token"),
        ("search", work.turns * (1 + rounds / 2) * work.search_seconds, "T (1 + rounds / 2) turns in a row"),
        ("update", update_tokens(work) * update_flops(shape, work) / (hardware.gpus * flops),
         "4 x (2 P + 4 L q x mean length) FLOPs a token, checkpointed; at most"),
        ("weights to the servers", 2 * FLOAT32 * shape.parameters / GB / hardware.disk, "4 P written, then read"),
    ]  # fmt: skip
    total = sum(seconds for _, seconds, _ in parts)
    hours = work.steps * total / 3600
    all_gpus = hardware.gpus + hardware.server_gpus
    return [
        *(Figure("Time", name, seconds, "s", source) for name, seconds, source in parts),
        Figure("Time", "a step", total, "s", "the sum: nothing overlaps, and no rollout is longer than the mean"),
        Figure("Time", f"{work.steps} steps", hours, "h", "without evaluations and checkpoints; not measured"),
        Figure(
            "Time", "GPU hours", hours * all_gpus, "h", f"x {all_gpus} GPUs; learner and servers wait for each other"
        ),
    ]


def wiki18() -> list[Figure]:
    """Sizes of the paper's corpus and its indexes."""
    flat = PASSAGES * E5_WIDTH * FLOAT32 / GB
    bm25 = "retrieval_index/wiki18-bm25.toml"
    figures: list[tuple[str, float | str, str, str]] = [
        ("passages", PASSAGES, "", bm25),
        ("download", 4.9, "GB", bm25),
        ("mapped corpus on disk", 15.0, "GB", f"{bm25}, extrapolated from a million passages"),
        ("BM25 index on disk", 12.0, "GB", f"{bm25}, extrapolated from a million passages"),
        ("E5 Flat on disk, and in memory", flat, "GB", "passages x 768 x 4 bytes"),
        ("E5 Flat on disk while it is built", 2 * flat, "GB", "vectors and index, docs/retrieval.md"),
        ("E5 Flat in 2, 4, 8 shards", f"{flat / 2:.1f}, {flat / 4:.1f}, {flat / 8:.1f}", "GB each", "--shard 0/8, ..."),
        ("E5 SQfp16, E5 SQ8", f"{flat / 2:.1f}, {flat / 4:.1f}", "GB", "2 bytes, 1 byte a number"),
    ]
    return [Figure("wiki-18", *figure) for figure in figures]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _inputs(shape: ModelShape, work: Workload, hardware: Hardware, source: str) -> list[Figure]:
    found = [Figure("Inputs", spec.name, getattr(shape, spec.name), "", source) for spec in fields(shape)]
    device = hardware.device._asdict()
    for part in (work, hardware):
        for spec in fields(part):
            value = getattr(part, spec.name)
            where = spec.metadata.get("source", "given")
            if spec.default is not None and value != spec.default:
                where = "given"
            if value is None:
                value, where = device[spec.name], "NVIDIA's data sheet"
            found.append(Figure("Inputs", spec.name, value, "", where))
    return found


def _widths(shape: ModelShape) -> tuple[int, int, int]:
    """Of all queries, of all keys, of the MLP."""
    queries = shape.heads * shape.head_dim or shape.hidden
    return queries, shape.kv_heads * shape.head_dim, shape.intermediate or 4 * shape.hidden


def _cache_tokens(shape: ModelShape, hardware: Hardware) -> float:
    """Tokens that a server's cache holds. Raises ConfigError where there is no room for one."""
    memory = hardware.tensor_parallel * hardware.device.memory * GB * hardware.server_memory
    room = memory - BFLOAT16 * shape.parameters
    if room < kv_bytes(shape):
        raise ConfigError(
            f"a server of {hardware.tensor_parallel} GPUs has {memory / GB:.1f} GB, and the model's weights need "
            f"{BFLOAT16 * shape.parameters / GB:.1f} GB; raise tensor_parallel or memory"
        )
    return room / kv_bytes(shape)


def _forks_at_once(work: Workload, hardware: Hardware) -> float:
    return work.questions * min(work.forks_per_round, work.forks) / hardware.servers


def _check_positive(options: Any, at_least: Mapping[str, float] | None = None) -> None:
    for spec in fields(options):
        value, low = getattr(options, spec.name), (at_least or {}).get(spec.name, 0)
        if isinstance(value, int | float) and not (0 < value < math.inf and value >= low):
            raise ConfigError(f"{spec.name} must be a number {f'of at least {low}' if low else 'above 0'}, not {value}")
