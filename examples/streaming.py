"""Hugging Face datasets, streamed, tokenised and packed as they arrive.

The iterator's state is small and plain (JSON): the dataset's own `state_dict`, the tokens left
over from the last document, and the epoch. Restoring it continues at the very next sequence.
"""

import copy
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import grain
import numpy as np

from examples import data as data_lib
from examples import tokenizer as bpe
from examples.errors import UserError

TOKENIZER_DOCUMENTS = 10_000
VALIDATION_DOCUMENTS = 1_000
SHUFFLE_WINDOW = 1_024  # Sequences held in memory and shuffled together.


class PackedStream(grain.IterDataset):
    """An endless grain dataset of sequences int32 (seq_len + 1,) from streamed documents."""

    def __init__(
        self,
        documents: datasets.IterableDataset,
        encode: Callable[[str], list[int]],
        seq_len: int,
        seed: int = 0,
    ):
        super().__init__()
        self.documents, self.encode = documents, encode
        self.seq_len, self.first_epoch = seq_len, seed

    def __iter__(self) -> "PackedStreamIterator":
        return PackedStreamIterator(self)


class PackedStreamIterator(grain.DatasetIterator):
    """Joins documents and cuts sequences; each starts with the last token of the one before."""

    def __init__(self, stream: PackedStream):
        super().__init__()
        self._stream = stream
        self._documents = copy.copy(stream.documents)  # It holds the position: never share it.
        self._tokens: list[int] = []
        self._start_epoch(0, None)

    def _start_epoch(self, epoch: int, position: dict[str, Any] | None) -> None:
        self._epoch, self._position = epoch, position
        # The epoch seeds the order of the dataset's files, where `datasets` shuffles them.
        self._documents.set_epoch(self._stream.first_epoch + epoch)
        self._documents.load_state_dict(position or {})
        self._rows = iter(self._documents)

    def _next_document(self) -> list[int]:
        row = next(self._rows, None)
        if row is None:
            self._start_epoch(self._epoch + 1, None)
            row = next(self._rows, None)
            if row is None:
                raise UserError(
                    "--data: the dataset has no documents to train on (without a validation"
                    f" split, the first {VALIDATION_DOCUMENTS} are held out)."
                )
        self._position = self._documents.state_dict()
        return self._stream.encode(row["text"])

    def __next__(self) -> np.ndarray:
        length = self._stream.seq_len + 1
        while len(self._tokens) < length:
            self._tokens += self._next_document()
        sequence = np.array(self._tokens[:length], np.int32)
        self._tokens = self._tokens[length - 1 :]
        return sequence

    def get_state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return copy.deepcopy(
            {"epoch": self._epoch, "position": self._position, "tokens": self._tokens}
        )

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position."""
        state = copy.deepcopy(state)
        self._tokens = state["tokens"]
        self._start_epoch(state["epoch"], state["position"])


def open_dataset(name: str) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """The streamed training and validation splits of a dataset with a column `text`.

    Without a validation (or test) split, the first documents of the training split serve.
    """
    path, _, config = name.removeprefix(data_lib.PREFIX).partition(":")
    if path == "allenai/c4" and not config:
        config = "en"
    try:
        splits = datasets.load_dataset(path, config or None, streaming=True)
    except Exception as error:  # The hub raises some ten kinds, ValueError to ConnectionError.
        raise UserError(
            f"--data: cannot open the Hugging Face dataset {name!r} ({error}). Check the name"
            " (owner/name or owner/name:config) and the network."
        ) from error
    if "train" not in splits:
        raise UserError(f"--data: {name!r} has no split named train, only {sorted(splits)}.")
    train = splits["train"]
    columns = train.column_names or sorted(next(iter(train), {}))
    if "text" not in columns:
        raise UserError(f"--data: {name!r} has no column named text, only {columns}.")
    for other in ("validation", "test"):
        if other in splits:
            return train, splits[other]
    return train.skip(VALIDATION_DOCUMENTS), train.take(VALIDATION_DOCUMENTS)


def texts(documents: datasets.IterableDataset, count: int) -> Iterator[str]:
    """The first texts of a dataset."""
    return (row["text"] for row in itertools.islice(documents, count))


def load(
    name: str,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    cache: pathlib.Path,
    share: tuple[int, int],
    vocabulary: bpe.Vocabulary | None = None,
) -> data_lib.Data:
    """`data.load` for a streamed dataset, of which each process reads all and keeps its share."""
    train, validation = open_dataset(name)
    tokenizer, end = vocabulary or bpe.own(
        bpe.cached(list(texts(train, TOKENIZER_DOCUMENTS)), vocab_size, cache)
    )
    held_out = bpe.encode_all(tokenizer, list(texts(validation, VALIDATION_DOCUMENTS)), end)
    if len(held_out) < 2:
        raise UserError(f"--data: the validation text of {name!r} is empty. Give a larger dataset.")
    stream = PackedStream(train, lambda text: bpe.encode(tokenizer, text, end), seq_len, seed)
    shuffled = grain.experimental.WindowShuffleIterDataset(
        stream, window_size=SHUFFLE_WINDOW, seed=seed
    )
    train_batches = shuffled.batch(batch_size, drop_remainder=True)
    k, n = share
    if n > 1:
        # Documents that each process packs for itself would be other sequences for each n.
        rows = slice(k * batch_size // n, (k + 1) * batch_size // n)
        train_batches = train_batches.map(lambda batch: batch[rows])
    return data_lib.Data(
        tokenizer=tokenizer,
        end=end,
        train=train_batches,
        validation=held_out,
        sequences=None,
    )
