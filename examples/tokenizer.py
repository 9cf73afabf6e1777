"""A byte-level BPE, trained on the training documents and kept in the user's cache.

Byte-level: any text encodes, and decodes back to itself. The cache key is a digest of the
documents and of the vocabulary size, so another Python version, or an edited file, trains a
new tokenizer instead of reading a stale one.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.errors import UserError
from examples.files import disk_errors, read_json, write_atomically

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # Every byte, and the end of text.


def cache_root(folder: str | None = None) -> pathlib.Path:
    """`folder`, or `galore_jax` under $XDG_CACHE_HOME, which defaults to ~/.cache."""
    if folder:
        return pathlib.Path(folder).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "galore_jax"


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_key(documents: Iterable[str], vocab_size: int) -> str:
    """Names what a tokenizer depends on: all documents, the size, the trainer's version."""
    parts = [f"{tokenizers.__version__} {vocab_size}", *map(digest, documents)]
    return digest("\n".join(parts))[:20]


def train(
    documents: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)
) -> tokenizers.Tokenizer:
    """A new tokenizer of `vocab_size` ids, of which the first are the special ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def cached(documents: Sequence[str], vocab_size: int, root: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of these documents: read from `root`, or trained and left there."""
    path = root / f"bpe-{cache_key(documents, vocab_size)}.json"
    if not path.exists():
        trained = train(documents, vocab_size)
        with disk_errors(f"--cache-dir: {str(path)!r} could not be written", "Give another one."):
            write_atomically(path, trained.to_str())
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Not stored in the file: text is never read as a special token, so a document that spells
    # out the end-of-text mark keeps those characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: tokenizers.Tokenizer) -> int:
    """The id between documents."""
    return int(tokenizer.token_to_id(END_OF_TEXT) or 0)


class Vocabulary(NamedTuple):
    """A tokenizer, and its id between documents."""

    tokenizer: tokenizers.Tokenizer
    end: int


def own(tokenizer: tokenizers.Tokenizer) -> Vocabulary:
    """Of a tokenizer that was trained here."""
    return Vocabulary(tokenizer, end_of_text(tokenizer))


def read(folder: str | os.PathLike, given_as: str = "") -> tokenizers.Tokenizer:
    """The tokenizer.json of a folder, for whole texts; for errors, how the folder was given."""
    path = pathlib.Path(folder) / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # It raises no other kind.
        raise UserError(f"{given_as}{path}: not a tokenizer's file ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def eos_ids(path: pathlib.Path) -> list[Any]:
    """What a JSON file of Hugging Face has for eos_token_id: none, one or several."""
    found = read_json(path).get("eos_token_id")
    return found if isinstance(found, list) else [found] * (found is not None)


def of_checkpoint(folder: str, vocab_size: int) -> Vocabulary:
    """The tokenizer beside a Hugging Face model, which ends documents as its config says."""
    path = pathlib.Path(folder) / "tokenizer.json"
    tokenizer = read(folder, "--init-from: ")
    tokenizer.encode_special_tokens = True
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise UserError(f"--init-from: {path}: it has {size} tokens, and the model {vocab_size}.")
    config = path.with_name("config.json")
    end = next(iter(eos_ids(config)), tokenizer.token_to_id(END_OF_TEXT))
    if not isinstance(end, int) or not 0 <= end < vocab_size:
        raise UserError(f"--init-from: {config}: eos_token_id {end!r} is no token.")
    return Vocabulary(tokenizer, end)


def encode(tokenizer: tokenizers.Tokenizer, document: str, end: int | None = None) -> list[int]:
    """The document's ids, with the end of text last."""
    ids = tokenizer.encode(document, add_special_tokens=False).ids
    return [*ids, end_of_text(tokenizer) if end is None else end]


def encode_all(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[str], end: int | None = None
) -> np.ndarray:
    """All documents, joined by the end of text, as one stream of ids (tokens,)."""
    end = end_of_text(tokenizer) if end is None else end
    parts = []
    for first in range(0, len(documents), 256):  # Bounds the memory of the encodings.
        batch = list(documents[first : first + 256])
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        parts += [np.array([*item.ids, end], np.uint32) for item in encoded]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)
