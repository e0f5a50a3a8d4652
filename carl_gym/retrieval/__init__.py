"""Finding passages: a corpus of texts and the retrievers that search it."""

from carl_gym.retrieval.bm25 import BM25
from carl_gym.retrieval.corpus import Corpus, Hit, Retriever

__all__ = ["BM25", "Corpus", "Hit", "Retriever"]
