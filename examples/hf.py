"""Checkpoints of Hugging Face into the LLaMA of the examples, and back.

The architectures are those of `examples.hf_config`, the files those of `examples.hf_files`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from examples import hf_files, llama
from examples.errors import UserError
from examples.files import read_json
from examples.hf_config import config_from_hf, config_to_hf
from examples.hf_files import CONFIG, FILE_BYTES, Leaf
from examples.llama_config import LlamaConfig

__all__ = ["config_from_hf", "load_hf", "read_config", "save_hf"]

_LAYER = "model.layers.{}."
_MODULES = {
    "embed": "model.embed_tokens",
    "blocks/attention_norm": _LAYER + "input_layernorm",
    **{f"blocks/attention/{x}": f"{_LAYER}self_attn.{x}_proj" for x in "qkvo"},
    **{f"blocks/attention/{x}": f"{_LAYER}self_attn.{x}" for x in ("q_norm", "k_norm")},
    "blocks/mlp_norm": _LAYER + "post_attention_layernorm",
    **{f"blocks/mlp/{x}": f"{_LAYER}mlp.{x}_proj" for x in ("gate", "up", "down")},
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}


def _leaves(config: LlamaConfig) -> list[Leaf]:
    return hf_files.leaves_of(jax.eval_shape(llama.initializer(config, 0)[1]), _MODULES)


def read_config(folder: str | os.PathLike) -> LlamaConfig:
    """The shape of the model in a folder, from its config.json."""
    path = pathlib.Path(folder) / CONFIG
    return config_from_hf(read_json(path), str(path))


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
    config, tensors = read_config(folder), hf_files.Tensors(folder)
    leaves = _leaves(config)
    dtype, left = tensors.check(leaves)
    # Computed from the config, and stored by older programs all the same.
    left = {name: path for name, path in left.items() if not name.endswith("rotary_emb.inv_freq")}
    head = left.pop("lm_head.weight", None) if config.tied else None
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if head is not None and not np.array_equal(tensors.read(both[0]), tensors.read(both[1])):
        raise UserError(f"{head}: tensor {both[0]} is not the embedding, as {CONFIG} ties it.")
    hf_files.refuse(left)
    dtype = param_dtype or dtype
    config = dataclasses.replace(config, param_dtype=dtype, dtype=dtype)
    return config, tensors.params(leaves, dtype)


def save_hf(
    folder: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model into a new folder that `transformers` loads: see `hf_files.save`."""
    hf_files.save(folder, _leaves(config), params, config_to_hf(config), file_bytes)
