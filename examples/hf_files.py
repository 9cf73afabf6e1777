"""Checkpoints of Hugging Face as files, `model.safetensors` or several, and our stacked layout.

A tensor at a time, in both directions: no more than the model and a tensor (to save, a file) of it
is in memory. Which tensors a model has is told by a table of its modules, as in `examples.hf`.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import galore_jax
from examples.errors import UserError
from examples.files import disk_errors, read_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FILE_BYTES = 2 * 10**9  # Of a file at most, where `save` writes several.

# Within a module, from our names to theirs; what is not here has the same name.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class Leaf(NamedTuple):
    """A leaf of our parameters, and where it is in a checkpoint."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: list[str]  # Of a stack one for each layer.
    stacked: bool
    transposed: bool  # Theirs are (out, in).

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of a tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves_of(params: Any, modules: Mapping[str, str]) -> list[Leaf]:
    """All leaves of a model, in the order of the tree.

    Args:
      params: its parameters, or their shapes.
      modules: from paths of our modules to their names, with `{}` for the number of a layer.
    """
    leaves = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        keys: tuple[str, ...] = tuple(entry.key for entry in path)
        name = f"{modules['/'.join(keys[:-1])]}.{_NAMES.get(keys[-1], keys[-1])}"
        stacked = "{}" in name
        names = [name.format(i) for i in range(x.shape[0] if stacked else 1)]
        leaves.append(Leaf(keys, x.shape, names, stacked, keys[-1] == "kernel"))
    return leaves


class Tensors:
    """The tensors of a checkpoint by name, in whichever file."""

    def __init__(self, folder: pathlib.Path):
        whole, index = folder / WEIGHTS, folder / INDEX
        self.files: dict[str, pathlib.Path]
        if whole.exists() or not index.exists():
            with self._opened(whole) as file:
                self.files = dict.fromkeys(file.keys(), whole)
            return
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise UserError(f"{index}: it has no weight_map.")
        for name, file in files.items():
            if not isinstance(file, str) or pathlib.Path(file).name != file:
                raise UserError(f"{index}: {name} is in {file!r}, which is no name of a file.")
        self.files = {name: folder / file for name, file in files.items()}
        for path in sorted(set(self.files.values())):
            with self._opened(path) as file:
                there = set(file.keys())
            for name in (name for name, where in self.files.items() if where == path):
                if name not in there:
                    raise UserError(f"{path}: {name} is missing, which the index puts there.")
            for name in sorted(there - set(self.files)):
                raise UserError(f"{path}: {name} is not in {index.name}.")

    @staticmethod
    def _opened(path: pathlib.Path) -> Any:
        if not path.exists():
            raise UserError(f"{path}: there is no such file.")
        try:
            return safetensors.safe_open(path, framework="np")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: damaged, or not of safetensors ({error}).") from error

    def described(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor."""
        with self._opened(self.files[name]) as file:
            header = file.get_slice(name)
            return tuple(header.get_shape()), header.get_dtype()

    def read(self, name: str) -> np.ndarray:
        """A tensor. Opened anew for each, as what a file has mapped stays in memory till then."""
        with self._opened(self.files[name]) as file:
            return file.get_tensor(name)

    def check(self, leaves: list[Leaf]) -> tuple[str, dict[str, pathlib.Path]]:
        """Refuses a checkpoint that these leaves are not in.

        Returns:
          The dtype that holds all of their tensors, and where there are tensors of no leaf.
        """
        dtypes, left = set(), dict(self.files)
        for leaf in leaves:
            for name in leaf.names:
                path = left.pop(name, None)
                if path is None:
                    where = next(iter(self.files.values())).parent
                    raise UserError(f"{where}: tensor {name} is missing, which {CONFIG} asks for.")
                shape, dtype = self.described(name)
                if shape != leaf.their_shape:
                    raise UserError(
                        f"{path}: tensor {name} has shape {shape}, and {CONFIG} asks for"
                        f" {leaf.their_shape}."
                    )
                if dtype not in _DTYPES:
                    raise UserError(
                        f"{path}: tensor {name} is in {dtype}, none of {', '.join(_DTYPES)}."
                    )
                dtypes.add(jnp.dtype(_DTYPES[dtype]))
        return str(jnp.result_type(*dtypes)), left

    def params(self, leaves: list[Leaf], dtype: str) -> dict[str, Any]:
        """The tree of these leaves, arrays of numpy, filled tensor by tensor."""
        params: dict[str, Any] = {}
        # The largest tensors first: while one is here twice, little else is.
        for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.their_shape)):
            out = np.empty(leaf.shape, jnp.dtype(dtype))
            for i, name in enumerate(leaf.names):
                tensor = self.read(name)
                (out[i] if leaf.stacked else out)[...] = tensor.T if leaf.transposed else tensor
            *above, last = leaf.path
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, params)[last] = out
        return params


def dtype_of(folder: str | os.PathLike) -> str:
    """The dtype that holds all tensors of a checkpoint."""
    tensors = Tensors(pathlib.Path(folder))
    names = {tensors.described(name)[1] for name in tensors.files} & set(_DTYPES)
    return str(jnp.result_type(*(jnp.dtype(_DTYPES[name]) for name in names)))


def refuse(left: Mapping[str, pathlib.Path]) -> None:
    """Refuses a checkpoint with tensors that no one knows, by name and file."""
    for name, path in sorted(left.items()):
        raise UserError(f"{path}: tensor {name} has no place in the model of {CONFIG}.")


def save(
    folder: str | os.PathLike,
    leaves: list[Leaf],
    params: Mapping[str, Any],
    fields: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model into a new folder that `transformers` loads.

    The folder gets its name when it is whole. What the tokenizer is goes into it afterwards.

    Args:
      folder: it is not there yet, or empty.
      leaves: those of the model.
      params: its parameters.
      fields: of config.json, but for the dtype.
      file_bytes: most bytes of tensors in a file, and in memory beside the model; where they are
        more there are several files, and an index.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already. Give another folder.")
    arrays = {leaf.path: _array(params, leaf) for leaf in leaves}
    for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_in_codes):
        if (keys := tuple(entry.key for entry in path)) not in arrays:
            raise UserError(f"params: {'/'.join(keys)} has no place in the model of the config.")
    fields = {**fields, "torch_dtype": str(arrays["embed", "embedding"].dtype)}
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with disk_errors(f"{folder}: it could not be written", "Make room, or give another one."):
            part.mkdir(parents=True)
            _write(part, _tensors_of(leaves, arrays), file_bytes)
            (part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _in_codes(x: Any) -> bool:
    return isinstance(x, galore_jax.Int8Weight)  # which layer by layer becomes an array


def _array(params: Mapping[str, Any], leaf: Leaf) -> Any:
    path = "/".join(leaf.path)
    try:
        found: Any = functools.reduce(lambda tree, key: tree[key], leaf.path, params)
    except KeyError:
        raise UserError(f"params: {path} is missing, which the config asks for.") from None
    if found.shape != leaf.shape:
        raise UserError(
            f"params: {path} has shape {found.shape}, and the config asks for {leaf.shape}."
        )
    return found


def _tensors_of(
    leaves: list[Leaf], arrays: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Name, bytes and a way to get it, of each tensor; layer by layer, as transformers has them."""

    def get(leaf: Leaf, i: int) -> np.ndarray:
        x = np.asarray(arrays[leaf.path][i] if leaf.stacked else arrays[leaf.path])
        return np.ascontiguousarray(x.T if leaf.transposed else x)

    for leaf in sorted(leaves, key=lambda leaf: leaf.path[0] != "embed"):
        size = arrays[leaf.path].nbytes // len(leaf.names)
        for i, name in enumerate(leaf.names):
            yield name, size, functools.partial(get, leaf, i)


def _write(
    folder: pathlib.Path,
    tensors: Iterator[tuple[str, int, Callable[[], np.ndarray]]],
    file_bytes: int,
) -> None:
    files: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    total = filled = 0
    for name, size, get in tensors:
        if filled and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append((name, get))
        filled, total = filled + size, total + size
    where = {}
    for i, content in enumerate(files):
        name = WEIGHTS
        if len(files) > 1:
            name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        path = folder / name
        safetensors.numpy.save_file(
            {key: get() for key, get in content}, path, metadata={"format": "pt"}
        )
        where |= {key: name for key, _ in content}
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
