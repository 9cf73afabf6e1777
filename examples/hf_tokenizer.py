"""What goes beside a model's weights in a Hugging Face folder: its tokenizer and special tokens."""

import json
import pathlib
import shutil
from typing import Any

from examples.files import read_json

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    "generation_config.json",
)
_CONFIG = "config.json"


def copy(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies what there is of a tokenizer, and the special tokens that its model's config names."""
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / _CONFIG).exists():
        given = read_json(source / _CONFIG)
        add(folder, {name: x for name, x in given.items() if name.endswith("_token_id")})


def add(folder: pathlib.Path, fields: dict[str, Any]) -> None:
    """Adds fields to a model's config.json."""
    path = folder / _CONFIG
    path.write_text(json.dumps(read_json(path) | fields, indent=2) + "\n")
