import dataclasses
import re

import pytest

from examples import command_line, finetune_config
from examples.config import Config
from examples.finetune_config import FinetuneConfig


@pytest.mark.parametrize(
    ("config", "parse"),
    [(Config, command_line.parse), (FinetuneConfig, finetune_config.parse)],
    ids=["pretrain", "finetune"],
)
def test_help_is_in_groups(config, parse, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    # Its own box, and then one with a title for each group.
    _, rest, *titled = re.split(r"(?m)^ (?:(\w+) )?options *$", shown)[1:]
    titles, boxes = titled[::2], titled[1::2]
    assert "--help" in rest
    assert titles == [group.__name__ for group in config.__bases__]
    for group, box in zip(config.__bases__, boxes, strict=True):
        for field in dataclasses.fields(group):
            assert command_line.flag(field.name) in box
    in_groups = [f.name for g in config.__bases__ for f in dataclasses.fields(g)]
    assert sorted(in_groups) == sorted(f.name for f in dataclasses.fields(config))


def test_flags_of_all_groups_reach_the_settings():
    flags = ["--model", "60m", "--lr", "0.5", "--rank", "0.25", "--no-remat", "--data", "a", "b"]
    config = command_line.cli(command_line.defaults(flags), flags, prog="p", description="d")
    assert (config.model, config.learning_rate, config.rank) == ("60m", 0.5, 0.25)
    assert (config.data, config.remat) == (("a", "b"), False)
    assert config.seq_len == command_line.defaults(flags).seq_len == 256
