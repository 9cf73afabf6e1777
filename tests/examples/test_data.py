"""Text to batches: what goes in comes out, in a known order, and from any point again."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from examples import data as data_lib
from examples import streaming
from examples import tokenizer as bpe
from examples.errors import UserError

SIZES = {"vocab_size": 300, "seq_len": 16, "batch_size": 3}


def write_texts(folder: pathlib.Path, count: int = 12) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    documents = [f"document {i}: " + f"word{i} é " * (5 + 3 * i) for i in range(count)]
    for i, text in enumerate(documents):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return documents


def open_texts(folder: pathlib.Path, **changes) -> data_lib.Data:
    write_texts(folder / "texts")
    settings = SIZES | {"seed": 0, "cache_dir": str(folder / "cache")} | changes
    return data_lib.load([str(folder / "texts")], **settings)


def take(iterator, count: int) -> list[np.ndarray]:
    return [next(iterator) for _ in range(count)]


def decode(data: data_lib.Data, ids: np.ndarray) -> str:
    return data.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def as_json(state: dict) -> dict:
    """What a checkpoint does to a state."""
    return json.loads(json.dumps(state))


# --- Documents ---


def test_default_text_is_the_standard_library_without_tests():
    documents = data_lib.stdlib_documents()
    assert len(documents) > 300
    assert any("class JSONDecoder" in text for text in documents)
    assert not any("from test import support" in text[:3000] for text in documents)
    train, validation = data_lib.split_documents(documents)
    assert 0.03 < len(validation) / len(train + validation) < 0.07


def test_split_is_by_file_disjoint_and_stable(tmp_path):
    documents = write_texts(tmp_path)
    copies = [*documents, documents[3], documents[7], "  \n"]
    train, validation = data_lib.split_documents(copies)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)  # Whole files, each once.
    assert data_lib.split_documents(copies[::-1]) == (train, validation)


def test_one_file_holds_out_its_end():
    text = "".join(f"line {i}\n" for i in range(100))
    train, validation = data_lib.split_documents([text])
    assert train[0] + validation[0] == text
    assert 0 < len(validation[0]) < len(train[0])


def test_read_documents_takes_text_only(tmp_path):
    write_texts(tmp_path / "deep" / "er", count=2)
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "more.md").write_text("# more")
    found = data_lib.read_documents([str(tmp_path / "deep"), str(tmp_path / "more.md")])
    assert len(found) == 3 and found[-1] == "# more"
    assert len(data_lib.read_documents([str(tmp_path)])) == 3


# --- Tokenizer ---


def test_tokenizer_gives_the_text_back():
    documents = ["def f(x):\n\treturn 'é' + x  # 日本\n" * 9, "spelled out <|endoftext|> mark"]
    tokenizer = bpe.train(documents, 300)
    tokenizer.encode_special_tokens = True
    for text in [*documents, "unseen \U0001f600 text\r\n"]:
        ids = bpe.encode(tokenizer, text)
        assert ids.count(tokenizer.token_to_id(bpe.END_OF_TEXT)) == 1
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text
    joined = [i for text in documents for i in bpe.encode(tokenizer, text)]
    np.testing.assert_array_equal(bpe.encode_all(tokenizer, documents), joined)


def test_tokenizer_cache_depends_on_text_and_size(tmp_path, monkeypatch):
    documents = ["some text " * 20, "other text " * 20]
    trained = []
    train = bpe.train
    monkeypatch.setattr(bpe, "train", lambda *args: trained.append(args) or train(*args))
    first = bpe.cached(documents, 280, tmp_path)
    again = bpe.cached(documents, 280, tmp_path)
    assert len(trained) == 1 and first.to_str() == again.to_str()
    assert len(bpe.encode(again, "<|endoftext|>")) > 2  # Text, from the cache too.
    bpe.cached([documents[0], documents[1] + "!"], 280, tmp_path)
    bpe.cached(documents, 290, tmp_path)
    assert len(trained) == 3
    assert not list(tmp_path.glob("tmp*"))


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bpe.cache_root() == tmp_path / "galore_jax"
    assert bpe.cache_root(str(tmp_path / "own")) == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bpe.cache_root() == pathlib.Path.home() / ".cache" / "galore_jax"


# --- Packing and order ---


@pytest.mark.parametrize("length", [17, 18, 32, 33, 34, 100])
def test_packing_loses_no_token(length):
    tokens = np.arange(length, dtype=np.uint32)
    sequences = data_lib.Sequences(tokens, 16)
    cut = [sequences[i] for i in range(len(sequences))]
    assert {s.shape for s in cut} == {(17,)} and cut[0].dtype == np.int32
    targets = np.concatenate([s[1:] for s in cut])
    assert set(targets) == set(range(1, length))
    assert all((np.diff(s) == 1).all() for s in cut)  # Each one a stretch of the stream.
    assert len(targets) - (length - 1) < 16  # Only the last sequence repeats anything.


@pytest.mark.parametrize("length", [2, 5, 33, 49, 50, 97, 200])
def test_validation_batches_count_every_target_once(length):
    tokens = np.arange(1000, 1000 + length, dtype=np.uint32)
    inputs, targets = [], []
    for ids, mask in data_lib.validation_batches(tokens, 16, 3):
        assert ids.shape == (3, 17) and mask.shape == (3, 16)
        inputs += ids[:, :-1][mask].tolist()
        targets += ids[:, 1:][mask].tolist()
    assert inputs == tokens[:-1].tolist()
    assert targets == tokens[1:].tolist()


def test_an_epoch_is_every_sequence_once_in_a_seeded_order():
    tokens = np.arange(16 * 30 + 1, dtype=np.uint32)

    def firsts(seed: int) -> np.ndarray:
        batches = take(iter(data_lib.batches(tokens, 16, 3, seed)), 20)
        return np.concatenate(batches)[:, 0].reshape(2, 30)

    first, second = firsts(0)
    assert sorted(first) == sorted(second) == list(range(0, 480, 16))
    assert (first != sorted(first)).any() and (first != second).any()
    np.testing.assert_array_equal(firsts(0), firsts(0))
    assert (firsts(1) != firsts(0)).any()


def test_training_text_comes_back_from_the_sequences(tmp_path):
    data = open_texts(tmp_path)
    documents = data_lib.read_documents([str(tmp_path / "texts")])
    train, validation = data_lib.split_documents(documents)
    end = bpe.END_OF_TEXT
    assert decode(data, data.validation) == "".join(text + end for text in validation)
    stream = "".join(text + end for text in train)
    for batch in take(iter(data.train), 2 * data.sequences // 3):
        assert batch.shape == (3, 17) and batch.dtype == np.int32
        # A sequence may cut a character of several bytes at its ends.
        assert all(decode(data, row).strip("\N{REPLACEMENT CHARACTER}") in stream for row in batch)


@pytest.mark.parametrize("consumed", [0, 1, 7, 40])
def test_iterator_resumes_exactly(tmp_path, consumed):
    data = open_texts(tmp_path)
    iterator = iter(data.train)
    take(iterator, consumed)
    state = as_json(iterator.get_state())
    expected = take(iterator, 30)
    other = iter(open_texts(tmp_path).train)
    other.set_state(state)
    np.testing.assert_array_equal(take(other, 30), expected)


# --- Hugging Face datasets ---


@pytest.fixture
def dataset(tmp_path) -> str:
    """A dataset of three files on disk; no network."""
    for shard in range(3):
        rows = [{"text": f"shard {shard} row {i} " * (i + 1), "url": ""} for i in range(7)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        folder = tmp_path / "dataset"
        folder.mkdir(exist_ok=True)
        (folder / f"train-{shard}.jsonl").write_text(lines)
    return f"hf:{folder}"


def open_dataset(name: str, monkeypatch, tmp_path, seed: int = 0) -> data_lib.Data:
    monkeypatch.setattr(streaming, "VALIDATION_DOCUMENTS", 4)
    monkeypatch.setattr(streaming, "SHUFFLE_WINDOW", 5)
    return data_lib.load([name], **SIZES, seed=seed, cache_dir=str(tmp_path / "cache"))


def test_streamed_dataset_is_packed_whole(dataset, monkeypatch, tmp_path):
    data = open_dataset(dataset, monkeypatch, tmp_path)
    train, _ = streaming.open_dataset(dataset)
    stream = iter(streaming.PackedStream(train, lambda t: bpe.encode(data.tokenizer, t), 16))
    sequences = take(stream, 60)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(sequences))
    text = decode(data, np.concatenate([sequences[0], *(s[1:] for s in sequences[1:])]))
    assert text.startswith("".join(row["text"] + bpe.END_OF_TEXT for row in train)[:500])
    assert "shard 0 row 0" in decode(data, data.validation)
    held_out = {row["text"] for row in streaming.open_dataset(dataset)[1]}
    assert len(held_out) == 4 and not held_out & {row["text"] for row in train}


@pytest.mark.slow
def test_streamed_dataset_resumes_exactly_over_epochs(dataset, monkeypatch, tmp_path):
    data = open_dataset(dataset, monkeypatch, tmp_path)
    expected = take(iter(data.train), 60)
    iterator, epochs = iter(data.train), set()
    for i, batch in enumerate(expected):
        np.testing.assert_array_equal(next(iterator), batch)
        if i % 3:
            continue  # A new process after every third batch: each epoch after others.
        state = as_json(iterator.get_state())
        epochs.add(state["parent_window_start_state"]["epoch"])
        iterator = iter(data.train)
        iterator.set_state(state)
    assert len(epochs) > 2
    other = take(iter(open_dataset(dataset, monkeypatch, tmp_path, seed=1).train), 60)
    assert not np.array_equal(other, expected)


def test_each_process_keeps_its_rows_of_a_streamed_batch(dataset, monkeypatch, tmp_path):
    whole = iter(open_dataset(dataset, monkeypatch, tmp_path).train)
    settings = SIZES | {"seed": 0, "cache_dir": str(tmp_path / "cache")}
    parts = [iter(data_lib.load([dataset], **settings, share=(k, 3)).train) for k in range(3)]
    for _ in range(4):
        np.testing.assert_array_equal(np.concatenate([next(p) for p in parts]), next(whole))
    assert all(as_json(part.get_state()) == as_json(whole.get_state()) for part in parts)


def test_dataset_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    assert data_lib.is_dataset_name("allenai/c4")
    assert data_lib.is_dataset_name("allenai/c4:realnewslike")
    assert data_lib.is_dataset_name("hf:texts")
    assert not data_lib.is_dataset_name("texts")
    assert not data_lib.is_dataset_name("texts/mistyped.txt")
    assert not data_lib.is_dataset_name("no/such/folder")


# --- Mistakes ---


def test_mistakes_name_the_flag(tmp_path, dataset):
    empty = tmp_path / "empty"
    empty.mkdir()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"content": "x"}\n')

    def message(path, **changes) -> str:
        settings = SIZES | {"seed": 0, "cache_dir": str(tmp_path / "cache")} | changes
        with pytest.raises(UserError) as caught:
            data_lib.load([str(path)], **settings)
        return str(caught.value)

    assert "--data" in message(tmp_path / "missing.txt") and "missing.txt" in message("missing.txt")
    assert "no text found" in message(empty)
    assert "--seq-len 16" in message(short)
    assert "not UTF-8" in message(binary)
    assert "--vocab-size" in message(short, vocab_size=100)
    assert "no column named text" in message(f"hf:{tmp_path / 'other'}")
    assert "cannot open" in message(f"hf:{tmp_path / 'nowhere'}")
