"""Tasks of text classification and regression: GLUE's as the GaLore paper tunes them, and your own.

Reference: Wang et al., `GLUE <https://arxiv.org/abs/1804.07461>`_, 2018. Rates and batch sizes:
Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, table 7 (rank 4).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jax.scipy.stats import rankdata

from examples import records
from examples.errors import UserError
from examples.padding import Example, held_out, padded

GLUE = "nyu-mll/glue"
REGRESSION = "regression"
# Columns that are texts, where none are given: the first of these that are there.
_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",))


@dataclasses.dataclass(frozen=True)
class Task:
    """What a row's texts and label are, and what counts."""

    columns: tuple[str, ...] = ()  # One text or two; by default as in `_TEXTS`.
    metric: str = "accuracy"  # Of the table; one of METRICS.
    label: str = "label"
    labels: tuple[str, ...] = ()  # Names of the classes; by default what the training rows have.
    learning_rate: float = 1e-5
    batch_size: int = 16
    validation: str = "validation"  # Split.


_PAIR = ("sentence1", "sentence2")
_YES_NO = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task(("sentence",), "matthews", learning_rate=3e-5, batch_size=32,
                 labels=("unacceptable", "acceptable")),
    "stsb": Task(_PAIR, "pearson", labels=(REGRESSION,)),
    "mrpc": Task(_PAIR, "f1", learning_rate=3e-5, labels=("not_equivalent", "equivalent")),
    "rte": Task(_PAIR, labels=_YES_NO),
    "sst2": Task(("sentence",), labels=("negative", "positive")),
    "mnli": Task(("premise", "hypothesis"), labels=_NLI, validation="validation_matched"),
    "qnli": Task(("question", "sentence"), labels=_YES_NO),
    "qqp": Task(("question1", "question2"), labels=("not_duplicate", "duplicate")),
}  # fmt: skip


def accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the rows that are right."""
    return float(np.mean(predicted == wanted))


def f1(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1, 0 where nothing is."""
    right = np.sum((predicted == 1) & (wanted == 1))
    total = np.sum(predicted == 1) + np.sum(wanted == 1)
    return float(2 * right / total) if total else 0.0


def pearson(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Correlation, 0 where one of them is constant; of two classes it is Matthews'."""
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(np.corrcoef(predicted, wanted)[0, 1])


def spearman(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Correlation of the ranks, 0 where one of them is constant."""
    return pearson(*(np.asarray(rankdata(x)) for x in (predicted, wanted)))


# Of which `scores` tells, the more the better.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    **{"accuracy": accuracy, "f1": f1, "matthews": pearson},
    **{"pearson": pearson, "spearman": spearman},
}
_TOGETHER = {"pearson": ("pearson", "spearman"), "accuracy": ("accuracy",)}


def scores(metric: str, outputs: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """A task's metric, and what is told beside it, of outputs (N, classes) or (N, 1)."""
    predicted = outputs[:, 0] if outputs.shape[1] == 1 else np.argmax(outputs, axis=1)
    names = _TOGETHER.get(metric, (metric, "accuracy"))
    return {name: METRICS[name](predicted, wanted) for name in names}


class Rows(NamedTuple):
    """A task's rows, ready to be trained on."""

    train: list[Example]
    validation: list[Example]
    task: Task  # With the columns and labels that were found.


def load(
    name: str | None,
    data: Sequence[str],
    eval_data: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    **found: Any,
) -> Rows:
    """Reads the rows of a task.

    Args:
      name: of TASKS, or None for rows of one's own.
      data: files or a dataset to train on; by default GLUE's.
      eval_data: to validate on; by default the dataset's split, or a tenth of the rows.
      encode: from one text or two to token ids.
      **found: fields of the task that were given.
    """
    task = dataclasses.replace(TASKS[name] if name else Task(), **found)
    if not data:
        train = records.from_hub("--task", GLUE, name, "train")
        validation = records.from_hub("--task", GLUE, name, task.validation)
    else:
        train, validation = records.load(data, eval_data, task.validation)
    if not task.columns:
        task = dataclasses.replace(task, columns=_columns(train[0], task.label))
    if not task.labels:
        task = dataclasses.replace(task, labels=_labels(train, task.label))
    examples = [_example(record, task, encode) for record in train]
    if validation:
        return Rows(examples, [_example(record, task, encode) for record in validation], task)
    return Rows(*held_out(examples), task)


def _columns(record: records.Record, label: str) -> tuple[str, ...]:
    for names in _TEXTS:
        if set(names) <= set(record.fields):
            return names
    texts = [k for k, v in record.fields.items() if isinstance(v, str) and k != label]
    raise UserError(
        f"--columns: give the columns that are texts, one or two; {record.where} has"
        f" {', '.join(texts) or 'none'}."
    )


def _labels(train: Sequence[records.Record], label: str) -> tuple[str, ...]:
    """Names of the classes; numbers with a fraction are no classes."""
    values = [_label(record, label) for record in train]
    if all(isinstance(value, float) for value in values):
        return (REGRESSION,)
    names = sorted({str(value) for value in values})
    if all(name.isdigit() for name in names):
        names = [str(i) for i in range(1 + max(map(int, names)))]
    if len(names) < 2:
        raise UserError(f"--data: all rows have the {label} {names[0]!r}: nothing to learn.")
    return tuple(names)


def _label(record: records.Record, label: str) -> Any:
    if (value := record.fields.get(label)) is None:
        raise UserError(f"{record.where}: it has no {label}. Name the column with --label.")
    if isinstance(value, str):  # As csv has numbers.
        try:
            return value if value.isdigit() else float(value)
        except ValueError:
            pass
    return value


def _example(record: records.Record, task: Task, encode: Callable) -> Example:
    value, target = _label(record, task.label), None
    if task.labels == (REGRESSION,):
        try:
            target = np.float32(value)
        except ValueError:
            target = np.float32("nan")
        if not np.isfinite(target):
            raise UserError(f"{record.where}: {task.label} {value!r} is not a number.")
    elif str(value) in task.labels:
        target = np.int32(task.labels.index(str(value)))
    elif str(value).isdigit() and int(value) < len(task.labels):
        target = np.int32(value)
    else:
        raise UserError(
            f"{record.where}: {task.label} {value!r} is none of {', '.join(task.labels)}."
        )
    return Example(encode([record.text(name) for name in task.columns]), target)


def encoder(tokenizer: tokenizers.Tokenizer, max_length: int) -> Callable:
    """From one text or two to token ids int32, with the model's special tokens, cut to a length."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)

    def encode(texts: Sequence[str]) -> np.ndarray:
        first, *second = texts
        return np.array(tokenizer.encode(first, second[0] if second else None).ids, np.int32)

    return encode


def collate(pad_id: int) -> Callable[[Sequence[Example], int, int], dict[str, np.ndarray]]:
    """Batches of tokens (B, T), which of them are there, and targets (B,)."""

    def batch(rows: Sequence[Example], length: int, count: int) -> dict[str, np.ndarray]:
        ids, targets = [row.ids for row in rows], np.array([row.target for row in rows])
        return {
            "tokens": padded(ids, length, count, pad_id),
            "mask": padded([np.ones(len(x), bool) for x in ids], length, count, False),
            "targets": np.pad(targets, (0, count - len(rows))),
        }

    return batch
