"""Known values against their estimates: bias and variance by cell, cosines of noisy vectors, means with errors.

What `benchmarks/credit_bench.py` needs to compare an algorithm's advantages and gradient with the exact ones. Batches
are independent of one another, and their members need not be: every estimate here uses that and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LEAST_ROWS = 3
"""With fewer of them a ratio of sums says nothing, nor does its error."""


@dataclass(eq=False)
class CellSums:
    """Sums over batches, by cell, from which bias and variance of estimates X of a value that each cell has follow.

    Args:
        cells: how many; such as the pairs of a state and an action.
    """

    cells: int
    count: FloatArray = field(init=False)
    total: FloatArray = field(init=False)
    square: FloatArray = field(init=False)
    batch_count2: FloatArray = field(init=False)
    batch_total2: FloatArray = field(init=False)
    batch_cross: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        for one in fields(self)[1:]:
            setattr(self, one.name, np.zeros(self.cells))

    def add(self, cells: IntArray, estimates: FloatArray) -> None:
        """Take in a batch: (n,) the cells, and the estimates there."""
        count = np.bincount(cells, minlength=self.cells).astype(np.float64)
        total = np.bincount(cells, estimates, minlength=self.cells)
        self.count += count
        self.total += total
        self.square += np.bincount(cells, estimates**2, minlength=self.cells)
        self.batch_count2 += count**2
        self.batch_total2 += total**2
        self.batch_cross += count * total

    def best_factor(self, exact: FloatArray) -> float:
        """The c that makes the sum of (c X - exact)^2 smallest; 0 where all X are 0."""
        size = self.square.sum()
        return float((self.total * exact).sum() / size) if size else 0.0

    def errors(self, exact: FloatArray, factor: float = 1.0) -> tuple[float, float, float, float]:
        """Bias, sd and rmse of factor * X, and the root mean square of `exact`, weighted by how often a cell came up.

        rmse^2 = bias^2 + sd^2. Bias is the root mean square over cells of E[factor X] - exact; its square is estimated
        from pairs of different batches, so that noise does not count as bias. Over the cells of at least two batches;
        all nan without any.

        Args:
            exact: (cells,) the values.
            factor: of the estimates.
        """
        pairs = self.count**2 - self.batch_count2
        seen = pairs > 0
        weight = self.count[seen].sum()
        if not weight:
            return (math.nan,) * 4
        products = (
            factor**2 * (self.total**2 - self.batch_total2)
            - 2 * factor * exact * (self.total * self.count - self.batch_cross)
            + exact**2 * pairs
        )
        bias2 = (self.count[seen] * products[seen] / pairs[seen]).sum() / weight
        squares = factor**2 * self.square - 2 * factor * exact * self.total + exact**2 * self.count
        mse = max(squares[seen].sum() / weight, 0.0)
        bias2 = min(max(bias2, 0.0), mse)
        size = (self.count * exact**2)[seen].sum() / weight
        return math.sqrt(bias2), math.sqrt(mse - bias2), math.sqrt(mse), math.sqrt(size)


def cosine_of_mean(gram: FloatArray, products: FloatArray, length: float) -> tuple[float, float]:
    """Cosine between E[g] and a vector, with its jackknife standard error; nan where noise hides the length of E[g].

        <mean g, x> / (|x| sqrt(mean over b != b' of <g_b, g_b'>))

    Args:
        gram: (n, n) of the batches' gradients.
        products: (n,) <g_b, x>.
        length: |x|.
    """

    def cosine(kept: BoolArray) -> float:
        n = int(kept.sum())
        inner = gram[np.ix_(kept, kept)]
        square = (inner.sum() - inner.trace()) / (n * (n - 1)) if n > 1 else 0.0
        return float(products[kept].mean() / (length * math.sqrt(square))) if square > 0 and length else math.nan

    n = len(products)
    left_out = np.array([cosine(np.arange(n) != b) for b in range(n)])
    error = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    whole = cosine(np.ones(n, dtype=np.bool_))
    return (math.nan, math.nan) if math.isnan(error) else (whole, error)


def mean_cosine(gram: FloatArray, products: FloatArray, length: float) -> tuple[float, float]:
    """Mean over batches of the cosine, with its standard error; a batch without a gradient counts as 0."""
    sizes = np.sqrt(np.diag(gram))
    return mean_and_error(np.divide(products, sizes * length, out=np.zeros(len(sizes)), where=sizes * length > 0))


def mean_and_error(sample: Sequence[float] | FloatArray) -> tuple[float, float]:
    """Mean and its standard error; nan for none, or for the error of one."""
    n = len(sample)
    mean = float(np.mean(sample)) if n else math.nan
    return mean, float(np.std(sample, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def ratio_and_error(pairs: FloatArray) -> tuple[float, float]:
    """Sum x / sum y over independent rows (x, y), y >= 0, with its standard error by the delta method.

    nan where fewer than `LEAST_ROWS` rows have any y.
    """
    if (pairs[:, 1] > 0).sum() < LEAST_ROWS:
        return math.nan, math.nan
    x, y = pairs.sum(axis=0)
    residuals = pairs[:, 0] - x / y * pairs[:, 1]
    return float(x / y), float(math.sqrt(len(pairs) / (len(pairs) - 1) * (residuals**2).sum()) / y)
