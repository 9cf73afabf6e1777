"""Examples of many lengths as batches of few shapes.

A batch is as long as its longest example, rounded up to one of a few lengths, so that a run
compiles its step a few times and not for every length. Examples of like length go together, in an
order that differs in each epoch: what a batch holds follows from the seed and the number of the
step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

_WINDOW = 32  # Batches that are sorted by length together.

# From examples, the length to fill them up to and the number of rows to a batch.
Collate = Callable[[Sequence[Any], int, int], dict[str, np.ndarray]]


class Example(NamedTuple):
    """Token ids int32 (T,), and what the model is to make of them."""

    ids: np.ndarray
    target: Any  # A class, a number, or of each token whether it is one to predict.


def common_length(rows: Sequence[Example], longest: int) -> int:
    """The next of 16, 32, 64, ... but no more than the longest that there may be."""
    length = max(len(row.ids) for row in rows)
    return min(longest, max(16, 1 << (length - 1).bit_length()))


def padded(rows: Sequence[np.ndarray], length: int, count: int, fill: Any) -> np.ndarray:
    """Rows (T,) as one array (count, length), `fill` behind them and in the rows that are left."""
    out = np.full((count, length), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Batches:
    """Random access to the batches of all epochs, by step. An epoch leaves out what fills none."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        steps: int,
        seed: int,
        longest: int,
        collate: Collate,
    ):
        self.examples, self.batch_size, self.steps = examples, batch_size, steps
        self.seed, self.longest, self.collate = seed, longest, collate
        self.lengths = np.array([len(example.ids) for example in examples])
        self.each_epoch = len(examples) // batch_size  # Batches.
        self._last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = [self.examples[i] for i in self.rows(index)]
        batch = self.collate(rows, common_length(rows, self.longest), len(rows))
        # For what is random in a step, such as dropout.
        seeds = np.random.default_rng((self.seed, index)).integers(2**31, size=len(rows))
        return batch | {"seed": seeds.astype(np.int32)}

    def rows(self, step: int) -> np.ndarray:
        """Which examples a step sees."""
        epoch, place = divmod(step, self.each_epoch)
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._epoch(epoch)
        return self._last[1][place]

    def _epoch(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.examples))[: self.each_epoch * self.batch_size]
        span = _WINDOW * self.batch_size
        windows = [order[start : start + span] for start in range(0, len(order), span)]
        by_length = [w[np.argsort(self.lengths[w], kind="stable")] for w in windows]
        return random.permutation(np.concatenate(by_length).reshape(-1, self.batch_size))


def held_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Nine tenths to train on and one to validate on, at random: a file may be sorted.

    The same whatever a run's seed.
    """
    order = np.random.default_rng(0).permutation(len(examples))
    cut = max(1, len(examples) // 10)
    return [examples[i] for i in order[cut:]], [examples[i] for i in order[:cut]]


def training_batches(batches: Batches) -> grain.IterDataset:
    """The batches in the order of the steps, whose position a checkpoint keeps."""
    source = grain.MapDataset.source(batches)
    return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def validation_batches(
    examples: Sequence[Example], batch_size: int, longest: int, collate: Collate
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Every example once, the shortest first.

    Yields:
      Which examples a batch's first rows are, and the batch; rows that are left in the last one are
      empty.
    """
    order = np.argsort([len(example.ids) for example in examples], kind="stable")
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        rows = [examples[i] for i in at]
        yield at, collate(rows, common_length(rows, longest), batch_size)
