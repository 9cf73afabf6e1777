"""Prompts and responses as token ids, and of each token whether it is one to learn.

A row is a prompt and its response, a conversation (`messages`, each with role and content), or a
`text` of which all is learned. Where the tokenizer has a chat template it writes what stands around
the parts, and each part is encoded by itself: so the model sees in training exactly what it will
see when it is asked.
"""

import datetime
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers

from examples import records
from examples.errors import UserError
from examples.padding import Example, padded

_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # Which a template may name.

Template = Callable[..., str]


class Part(NamedTuple):
    """A piece of a text."""

    text: str
    learned: bool
    ends: bool  # Whether the end of a text follows.


def chat_template(folder: pathlib.Path) -> Template | None:
    """The chat template beside a tokenizer, None where there is none."""
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        source = (
            alone.read_text(encoding="utf-8") if alone.exists() else config.get("chat_template")
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it does not read ({error}).") from error
    if isinstance(source, list):  # Several, by name.
        source = next((x.get("template") for x in source if x.get("name") == "default"), None)
    if source is None:
        return None
    special = {}
    for name in _TOKENS:
        token = config.get(name)
        special[name] = (token.get("content") if isinstance(token, dict) else token) or ""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # A template comes with a checkpoint, from anybody: it may not reach the machine.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
    # What Hugging Face's templates may call.
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{folder}: its chat template is no Jinja ({error}).") from error
    return lambda **values: template.render(**special, **values)


def conversation(record: records.Record) -> list[dict[str, str]] | None:
    """A row's messages, None where it is a text."""
    fields = record.fields
    if "messages" in fields:
        messages = fields["messages"]
        for message in messages if isinstance(messages, list) else [None]:
            parts = message if isinstance(message, dict) else {}
            if not all(isinstance(parts.get(name), str) for name in ("role", "content")):
                raise UserError(
                    f"{record.where}: messages must be a list of objects with role and content."
                )
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    for ask, answer in _FIELDS:
        if ask in fields and answer in fields:
            return [
                {"role": "user", "content": record.text(ask)},
                {"role": "assistant", "content": record.text(answer)},
            ]
    if "text" in fields:
        return None
    raise UserError(
        f"{record.where}: a row has prompt and response, messages, or text; this one has"
        f" {', '.join(fields)}."
    )


def parts(record: records.Record, template: Template | None) -> Iterator[Part]:
    """What a row's text is made of, in order.

    Args:
      record: the row.
      template: writes a conversation as one text; without one its messages follow each other.
    """
    messages = conversation(record)
    if messages is None:
        yield Part(record.text("text"), learned=True, ends=True)
        return
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{record.where}: no message is the assistant's: nothing to learn.")
    written = ""
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant"
        if template is None:
            yield Part(message["content"], learned=answer, ends=answer)
        if template is None or not answer:
            continue
        try:
            before = template(messages=messages[:i], add_generation_prompt=True)
            after = template(messages=messages[: i + 1], add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise UserError(f"{record.where}: the chat template refuses it ({error}).") from error
        if not (before.startswith(written) and after.startswith(before)):
            raise UserError(
                f"{record.where}: the chat template rewrites earlier messages, so responses are"
                " not to be told apart. Give --no-chat-template."
            )
        yield Part(before[len(written) :], learned=False, ends=False)
        yield Part(after[len(before) :], learned=True, ends=False)
        written = after


def encoder(
    tokenizer: tokenizers.Tokenizer, end: int, template: Template | None, max_length: int
) -> Callable[[records.Record], Example | None]:
    """From a row to its ids, cut to a length; None where nothing to learn is left.

    Args:
      tokenizer: the model's.
      end: its id at the end of a text.
      template: see `parts`.
      max_length: most tokens.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # A template writes special tokens as text; nobody else does.
    tokenizer.encode_special_tokens = template is None
    # What the model has before any text, where no template writes it.
    start = [i for i in tokenizer.encode("").ids if i != end] if template is None else []

    def encode(record: records.Record) -> Example | None:
        ids, learned = list(start), [False] * len(start)
        for part in parts(record, template):
            new = tokenizer.encode(part.text, add_special_tokens=False).ids
            new += [end] * part.ends
            ids += new
            learned += [part.learned] * len(new)
        ids, learned = ids[:max_length], learned[:max_length]
        if not any(learned[1:]):  # The first token follows none.
            return None
        return Example(np.array(ids, np.int32), np.array(learned))

    return encode


def collate(rows: Sequence[Example], length: int, count: int) -> dict[str, np.ndarray]:
    """Batches of tokens (B, T + 1) and weights (B, T) of the targets, which are 1 in all."""
    tokens = padded([row.ids for row in rows], length + 1, count, 0)
    learned = padded([row.target for row in rows], length + 1, count, False)[:, 1:]
    return {"tokens": tokens, "weights": learned.astype(np.float32) / max(1, learned.sum())}
