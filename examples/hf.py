"""Checkpoints of Hugging Face, `model.safetensors` or several of them, and our stacked layout.

A tensor at a time, in both directions: no more than the model and a tensor (to save, a file) of it
is in memory. The architectures are those of `examples.hf_config`.
"""

import dataclasses
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

from examples import llama
from examples.errors import UserError
from examples.files import disk_errors, read_json
from examples.hf_config import config_from_hf, config_to_hf
from examples.llama_config import LlamaConfig

__all__ = ["config_from_hf", "load_hf", "read_config", "save_hf"]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FILE_BYTES = 2 * 10**9  # Of a file at most, where `save_hf` writes several.

# From our names to theirs; what is not here has the same name.
_NAMES = {
    **{"embed": "embed_tokens", "final_norm": "norm", "blocks": "layers"},
    **{"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    **{"attention": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    **{"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    **{"kernel": "weight", "scale": "weight", "embedding": "weight"},
}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class _Leaf(NamedTuple):
    """A leaf of our parameters, and where it is in a checkpoint."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: list[str]  # Of a stack one for each layer.
    stacked: bool
    transposed: bool  # Theirs are (out, in).

    @property
    def their_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def _leaves(config: LlamaConfig) -> Iterator[_Leaf]:
    """All leaves of a model, in the order of the tree."""
    shapes = jax.eval_shape(llama.initializer(config, 0)[1])
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        keys: tuple[str, ...] = tuple(entry.key for entry in path)
        words = [_NAMES.get(key, key) for key in keys]
        if keys[0] != "lm_head":
            words.insert(0, "model")
        stacked = keys[0] == "blocks"
        names = [".".join(words)]
        if stacked:
            names = [".".join([*words[:2], str(i), *words[2:]]) for i in range(config.layers)]
        yield _Leaf(keys, x.shape, names, stacked, keys[-1] == "kernel")


def read_config(folder: str | os.PathLike) -> LlamaConfig:
    """The shape of the model in a folder, from its config.json."""
    path = pathlib.Path(folder) / CONFIG
    return config_from_hf(read_json(path), str(path))


class _Tensors:
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


def load_hf(
    folder: str | os.PathLike, param_dtype: str | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """The model in a folder: its shape, and its parameters as `llama.create` lays them out.

    They are arrays of numpy, filled tensor by tensor.

    Args:
      folder: has config.json and model.safetensors, or several files and their index.
      param_dtype: of the parameters and of the activations; by default the checkpoint's.

    Raises:
      UserError: a file, a field or a tensor is missing, damaged, of another shape or unknown.
    """
    folder = pathlib.Path(folder)
    config, tensors = read_config(folder), _Tensors(folder)
    leaves = list(_leaves(config))
    dtype = _check(leaves, tensors, config)
    dtype = param_dtype or dtype
    params: dict[str, Any] = {}
    # The largest tensors first: while one is here twice, little else is.
    for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.their_shape)):
        out = np.empty(leaf.shape, jnp.dtype(dtype))
        for i, name in enumerate(leaf.names):
            tensor = tensors.read(name)
            (out[i] if leaf.stacked else out)[...] = tensor.T if leaf.transposed else tensor
        place = functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf.path[:-1], params)
        place[leaf.path[-1]] = out
    return dataclasses.replace(config, param_dtype=dtype, dtype=dtype), params


def _check(leaves: list[_Leaf], tensors: _Tensors, config: LlamaConfig) -> str:
    """Refuses a checkpoint that is not of this model; the dtype that holds all of its tensors."""
    dtypes, left = set(), dict(tensors.files)
    for leaf in leaves:
        for name in leaf.names:
            path = left.pop(name, None)
            if path is None:
                where = next(iter(tensors.files.values())).parent
                raise UserError(f"{where}: tensor {name} is missing, which {CONFIG} asks for.")
            shape, dtype = tensors.described(name)
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
    # Computed from the config, and stored by older programs all the same.
    left = {name: path for name, path in left.items() if not name.endswith("rotary_emb.inv_freq")}
    head = left.pop("lm_head.weight", None) if config.tied else None
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if head is not None and not np.array_equal(tensors.read(both[0]), tensors.read(both[1])):
        raise UserError(f"{head}: tensor {both[0]} is not the embedding, as {CONFIG} ties it.")
    for name, path in sorted(left.items()):
        raise UserError(f"{path}: tensor {name} has no place in the model of {CONFIG}.")
    return str(jnp.result_type(*dtypes))


def save_hf(
    folder: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model into a new folder that `transformers` loads.

    The folder gets its name when it is whole. What the tokenizer is goes into it afterwards.

    Args:
      folder: it is not there yet, or empty.
      config: the shape.
      params: as `llama.create` lays them out.
      file_bytes: most bytes of tensors in a file, and in memory beside the model; where they are
        more there are several files, and an index.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already. Give another folder.")
    leaves = list(_leaves(config))
    arrays = {leaf.path: _array(params, leaf) for leaf in leaves}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if (keys := tuple(entry.key for entry in path)) not in arrays:
            raise UserError(f"params: {'/'.join(keys)} has no place in the model of the config.")
    dtype = str(arrays["embed", "embedding"].dtype)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    fields = config_to_hf(config, dtype)
    try:
        with disk_errors(f"{folder}: it could not be written", "Make room, or give another one."):
            part.mkdir(parents=True)
            _write(part, _tensors_of(leaves, arrays), file_bytes)
            (part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _array(params: Mapping[str, Any], leaf: _Leaf) -> Any:
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
    leaves: list[_Leaf], arrays: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Name, bytes and a way to get it, of each tensor; layer by layer, as transformers has them."""

    def get(leaf: _Leaf, i: int) -> np.ndarray:
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
