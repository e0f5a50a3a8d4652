"""The sampler's random numbers: streams of SplitMix64, uniform along a stream and over seeds."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from model_toys import chi_square

from carl_gym.agents.draws import uniforms


def splitmix64(seed: int, count: int) -> list[int]:
    """The reference generator in plain integers (Vigna's splitmix64.c)."""
    outputs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_known_values_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    assert splitmix64(0, 3) == published
    zero = np.zeros(1, dtype=np.uint64)
    assert [uniforms(zero, i)[0] for i in range(3)] == [(value >> 11) / 2**53 for value in published]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(0, 300))
def test_uniforms_are_the_streams_of_splitmix64(seeds: list[int], index: int) -> None:
    expected = [(splitmix64(seed, index + 1)[-1] >> 11) / 2**53 for seed in seeds]
    assert uniforms(np.array(seeds, dtype=np.uint64), index).tolist() == expected


def test_uniforms_are_uniform_over_seeds_and_along_a_stream() -> None:
    n = 100_000
    over_seeds = uniforms(np.arange(n, dtype=np.uint64), 3)
    along = np.array([uniforms(np.array([2**40 + 7], dtype=np.uint64), i)[0] for i in range(n // 10)])
    for sample in (over_seeds, along):
        assert sample.min() >= 0
        assert sample.max() < 1
        counts = Counter((bin_,) for bin_ in np.floor(sample * 64).astype(int).tolist())
        assert abs(chi_square(counts, {(i,): 1 / 64 for i in range(64)})) < 4
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 4 / math.sqrt(len(sample))
    following = uniforms(np.arange(n, dtype=np.uint64), 4)
    assert abs(np.corrcoef(over_seeds, following)[0, 1]) < 4 / math.sqrt(n)
