"""A run's model as a folder that `transformers` loads: `python -m examples.export RUN FOLDER`.

The weights are those of the newest checkpoint, also of a run that is at work. The tokenizer goes
with them: that of the run, or of the model that it began from.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from examples import checkpoints, hf, hf_tokenizer, pretrain
from examples import config as config_lib
from examples import tokenizer as bpe
from examples.errors import exit_code


@dataclasses.dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run of examples.pretrain."""
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """A new folder."""


def export(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the newest checkpoint of a run."""
    config = dataclasses.replace(config_lib.read(run, "RUN"), mesh="")
    params = checkpoints.read_params(run, jax.eval_shape(pretrain.initializer(config)[1]))
    hf.save_hf(folder, pretrain.model_config(config), params)
    if config.init_from:
        hf_tokenizer.copy(pathlib.Path(config.init_from), folder)
    else:
        _own_tokenizer(run, folder)
    print(f"wrote {folder}")


def _own_tokenizer(run: pathlib.Path, folder: pathlib.Path) -> None:
    shutil.copyfile(run / "tokenizer.json", folder / "tokenizer.json")
    # By which `transformers` knows it.
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bpe.END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    hf_tokenizer.add(folder, {"eos_token_id": bpe.own(bpe.read(run)).end})


def main(args: Sequence[str] | None = None) -> int:
    """The command line: 0 for success, 2 for a mistake of the user."""
    options = tyro.cli(
        Options,
        args=sys.argv[1:] if args is None else args,
        prog="python -m examples.export",
        description="Writes a run's model as a folder that transformers loads.",
    )
    return exit_code(lambda: export(pathlib.Path(options.run), pathlib.Path(options.folder)))


if __name__ == "__main__":
    sys.exit(main())
