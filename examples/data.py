"""Text to batches of token ids, with grain.

Documents are split into train and validation whole, joined by an end-of-text token into one
stream, and the stream is cut into sequences of seq_len + 1 tokens without padding. A sequence
begins with the last token of the one before it, so every token is a target exactly once.

The default text is the Python standard library: every machine has it, no network needed.
"""

import dataclasses
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tokenizers

from examples import tokenizer as bpe
from examples.errors import UserError

PREFIX = "hf:"  # Says that what follows is a Hugging Face dataset.
VALIDATION_SHARE = 0.05
# Packages and tests; and two folders of tables (character names, help texts) that would fill a
# third of the default text with what is not Python.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("encodings", "pydoc_data"),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """What a trainer needs: the tokenizer, training batches, the validation stream."""

    tokenizer: tokenizers.Tokenizer
    end: int  # The id between documents.
    train: grain.IterDataset  # Of int32 (batch_size, seq_len + 1).
    validation: np.ndarray  # Token ids (tokens,).
    sequences: int | None  # In one epoch; None where a streamed dataset does not say.

    def opening(self, count: int = 8) -> list[int]:
        """The first tokens of the first validation document that has any."""
        begin = np.argmax(self.validation != self.end)
        document = self.validation[begin : begin + count].tolist()
        # Where all documents are empty, the end of one: a model then begins another.
        return document[: document.index(self.end) or 1] if self.end in document else document


def read_text(path: pathlib.Path) -> str | None:
    """The file's text, or None where it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def stdlib_documents() -> list[str]:
    """The sources of the running Python's standard library, without tests and packages."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]
    return [text for text in map(read_text, files) if text]


def read_documents(paths: Sequence[str]) -> list[str]:
    """Every text file among `paths` and, for folders, below them; hidden files stay out."""
    documents = []
    for name in paths:
        root = pathlib.Path(name).expanduser()
        if not root.exists():
            raise UserError(
                f"--data: there is no file or folder {name!r}. Give paths that exist, or a"
                " Hugging Face dataset as owner/name."
            )
        if root.is_file():
            text = read_text(root)
            if text is None:
                raise UserError(f"--data: {name!r} is not UTF-8 text. Convert it, or leave it out.")
            documents.append(text)
            continue
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            text = read_text(path) if path.is_file() and not hidden else None
            if text:
                documents.append(text)
    return documents


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Train and validation documents: whole documents, chosen by a digest of their text.

    Not by position or name, so the split is the same wherever the files lie. Copies of one
    document count once: else one could land on each side.

    Args:
      documents: at least one text. Of a single one, the last part becomes the validation.

    Returns:
      (train, validation), both not empty.
    """
    unique = sorted({text for text in documents if text.strip()}, key=bpe.digest)
    if not unique:
        raise UserError("--data: no text found. Give UTF-8 text files, or folders that hold some.")
    if len(unique) == 1:
        cut = int(len(unique[0]) * (1 - VALIDATION_SHARE))
        return [unique[0][:cut]], [unique[0][cut:]]
    count = max(1, round(len(unique) * VALIDATION_SHARE))
    return unique[count:], unique[:count]


class Sequences:
    """Random access to a stream of tokens (tokens,) in sequences (seq_len + 1,).

    The last one is moved back to end with the stream: nothing is padded, nothing is lost.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.tokens, self.seq_len = tokens, seq_len
        self.last_start = len(tokens) - seq_len - 1

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, index: int) -> np.ndarray:
        start = min(index * self.seq_len, self.last_start)
        return self.tokens[start : start + self.seq_len + 1].astype(np.int32)


def batches(
    tokens: np.ndarray,
    seq_len: int,
    batch_size: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Endless batches (batch_size, seq_len + 1); every epoch in an order of its own.

    Batches may span two epochs, so that no sequence is dropped at an epoch's end. Of `share`
    (k, n) each batch has the k-th n-th of its rows. The position counts whole batches: it is the
    same in all processes, however many there are.
    """
    k, n = share
    dataset = grain.MapDataset.source(Sequences(tokens, seq_len))
    dataset = dataset.shuffle(seed=seed).repeat().batch(batch_size // n, drop_remainder=True)
    dataset = dataset if n == 1 else dataset[k::n]
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def validation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream once, in order, every token but the first as a target exactly once.

    Yields:
      ids int32 (batch_size, seq_len + 1) and a mask bool (batch_size, seq_len) of the targets
      that count. Only the last batch is filled up, with zeros that do not count, so one
      compiled evaluation serves all.
    """
    span = seq_len * batch_size  # Targets in a batch.
    for start in range(0, len(tokens) - 1, span):
        chunk = tokens[start : start + span + 1].astype(np.int32)
        ids = np.pad(chunk, (0, span + 1 - len(chunk)))
        rows = np.arange(batch_size)[:, None] * seq_len + np.arange(seq_len + 1)
        mask = np.arange(span) < len(chunk) - 1
        yield ids[rows], mask.reshape(batch_size, seq_len)


def is_dataset_name(name: str) -> bool:
    """`hf:anything`, or owner/name[:config].

    Where a folder `owner` exists, owner/name is a path, if a mistyped one.
    """
    if name.startswith(PREFIX):
        return True
    looks_right = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", name)
    return bool(looks_right) and not pathlib.Path(name).parent.exists()


def check_length(tokens: np.ndarray, seq_len: int, which: str) -> None:
    """Refuses a stream that does not fill one sequence."""
    if len(tokens) <= seq_len:
        raise UserError(
            f"--data: the {which} text is {len(tokens)} tokens, shorter than one sequence of"
            f" --seq-len {seq_len} and its target. Give more text, or a smaller --seq-len."
        )


def load(
    paths: Sequence[str],
    *,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    cache_dir: str | None = None,
    share: tuple[int, int] = (0, 1),
    vocabulary: bpe.Vocabulary | None = None,
) -> Data:
    """Opens a data source; see the flag `--data` of `examples.pretrain`.

    Args:
      paths: files and folders of text, or one Hugging Face dataset (`owner/name`,
        `owner/name:config`, or `hf:` before anything `datasets.load_dataset` takes). Empty for
        the Python standard library.
      vocab_size: size of the vocabulary the tokenizer is trained for.
      seq_len: targets in a sequence.
      batch_size: sequences in a batch.
      seed: of the shuffling.
      cache_dir: folder for the trained tokenizer, the user's cache directory by default.
      share: (k, n) for the k-th n-th of each training batch.
      vocabulary: of a model that is there already; by default a tokenizer is trained.
    """
    if vocabulary is None and vocab_size < bpe.SMALLEST_VOCAB:
        raise UserError(f"--vocab-size: at least {bpe.SMALLEST_VOCAB} (every byte, end of text).")
    cache = bpe.cache_root(cache_dir)
    if len(paths) == 1 and is_dataset_name(paths[0]):
        from examples import streaming  # Only here: `datasets` takes a second to import.

        return streaming.load(
            paths[0], vocab_size, seq_len, batch_size, seed, cache, share, vocabulary
        )
    train, validation = split_documents(read_documents(paths) if paths else stdlib_documents())
    tokenizer, end = vocabulary or bpe.own(bpe.cached(train, vocab_size, cache))
    train_tokens = bpe.encode_all(tokenizer, train, end)
    validation_tokens = bpe.encode_all(tokenizer, validation, end)
    check_length(train_tokens, seq_len, "training")
    if len(validation_tokens) < 2:
        raise UserError("--data: the validation text is empty. Give more text.")
    return Data(
        tokenizer=tokenizer,
        end=end,
        train=batches(train_tokens, seq_len, batch_size, seed, share),
        validation=validation_tokens,
        sequences=len(Sequences(train_tokens, seq_len)),
    )
