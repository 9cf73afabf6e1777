"""Checkpoints of Hugging Face into the RoBERTa of the examples, and back.

A classifier comes with its head. What a masked language model was trained with is left behind, and
a new head put in its place. Known are RoBERTa, DistilRoBERTa and XLM-RoBERTa of all sizes.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples import hf_fields, hf_files, roberta
from examples.errors import UserError
from examples.files import read_json
from examples.hf_fields import Fields
from examples.hf_files import CONFIG, FILE_BYTES, Leaf
from examples.roberta_config import RobertaConfig

__all__ = ["config_from_hf", "load_hf", "read_config", "save_hf"]

_LAYER = "roberta.encoder.layer.{}."
_MODULES = {
    "embed": "roberta.embeddings.word_embeddings",
    "position_embed": "roberta.embeddings.position_embeddings",
    "type_embed": "roberta.embeddings.token_type_embeddings",
    "embed_norm": "roberta.embeddings.LayerNorm",
    "blocks/attention/q": _LAYER + "attention.self.query",
    "blocks/attention/k": _LAYER + "attention.self.key",
    "blocks/attention/v": _LAYER + "attention.self.value",
    "blocks/attention/o": _LAYER + "attention.output.dense",
    "blocks/attention_norm": _LAYER + "attention.output.LayerNorm",
    "blocks/mlp/up": _LAYER + "intermediate.dense",
    "blocks/mlp/down": _LAYER + "output.dense",
    "blocks/mlp_norm": _LAYER + "output.LayerNorm",
    "classifier/dense": "classifier.dense",
    "classifier/out": "classifier.out_proj",
}
# Of pre-training, and a buffer that older versions stored.
_DROPPED = {
    *("lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias"),
    *("lm_head.dense.weight", "lm_head.dense.bias"),
    *("lm_head.layer_norm.weight", "lm_head.layer_norm.bias"),
    *("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
    "roberta.embeddings.position_ids",
}

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
HEADLESS, WITH_HEAD = "ForMaskedLM", "ForSequenceClassification"

IRRELEVANT = hf_fields.IRRELEVANT | {
    *("tie_word_embeddings", "output_past", "gradient_checkpointing", "finetuning_task"),
    *("num_labels", "_num_labels"),  # Of a model without a head.
}
NEUTRAL = hf_fields.NEUTRAL | {
    **{"is_decoder": False, "add_cross_attention": False},
    "position_embedding_type": "absolute",
}


def config_from_hf(
    fields: Mapping[str, Any], source: str = CONFIG, labels: int | None = None
) -> tuple[RobertaConfig, bool]:
    """The shape that the fields of a config.json describe, and whether it comes with a head.

    Args:
      fields: what JSON made of the file.
      source: the file, for errors.
      labels: how many the head is to have; without, those that it has, or two.

    Raises:
      UserError: a field is missing, of no known name, or of a value that the model has no place
        for.
    """
    given = Fields(fields, source)
    kind = given.take("model_type", str)
    if kind not in CLASSES:
        raise given.refuse(
            "model_type", f"{kind!r} is none of the known ones, {', '.join(CLASSES)}"
        )
    known = [[CLASSES[kind] + suffix] for suffix in (HEADLESS, WITH_HEAD)]
    classes = given.take("architectures", list)
    if classes not in known:
        raise given.refuse("architectures", f"is {classes!r}, neither {known[0]} nor {known[1]}")
    with_head = classes == known[1]
    labels, names = _labels(given, with_head, labels)
    settings = {
        "vocab_size": given.take("vocab_size", int, smallest=1),
        "hidden": given.take("hidden_size", int, smallest=1),
        "intermediate": given.take("intermediate_size", int, smallest=1),
        "heads": given.take("num_attention_heads", int, smallest=1),
        "layers": given.take("num_hidden_layers", int, smallest=1),
        "max_positions": given.take("max_position_embeddings", int, smallest=1),
        "type_vocab": given.take("type_vocab_size", int, 2, smallest=1),
        "pad_id": given.take("pad_token_id", int, 1, smallest=0),
        "norm_eps": float(given.take("layer_norm_eps", float, 1e-12)),
        "activation": given.activation("gelu"),
        "labels": labels,
        "label_names": names,
        "dropout": float(given.take("hidden_dropout_prob", float, 0.1)),
        "attention_dropout": float(given.take("attention_probs_dropout_prob", float, 0.1)),
        "classifier_dropout": given.take("classifier_dropout", float, None),
        "init_scale": float(given.take("initializer_range", float, 0.02)),
        "model_type": kind,
    }
    given.refuse_rest(kind, NEUTRAL, IRRELEVANT)
    try:
        return RobertaConfig(**settings), with_head
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _labels(
    given: Fields, with_head: bool, wanted: int | None
) -> tuple[int, tuple[str, ...] | None]:
    """How many labels there are, and their names if they have any of their own."""
    if not with_head:
        return 2 if wanted is None else wanted, None
    by_id = given.take("id2label", dict, {})
    # A model of two labels need not name them.
    count = given.take("num_labels", int, len(by_id) or 2, smallest=1)
    names = tuple(by_id.get(str(i)) for i in range(len(by_id)))
    named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    if by_id and (len(by_id) != count or not named):
        raise given.refuse("id2label", f"is {by_id!r}, not of the labels 0 to {count - 1}")
    if wanted not in (None, count):
        raise UserError(
            f"{given.source}: its classifier has {count} labels, not {wanted}. Give the model that"
            " it was made from."
        )
    kind = given.take("problem_type", str, _problem(count))
    if kind != _problem(count):
        raise given.refuse(
            "problem_type", f"is {kind!r}, and of {count} labels {_problem(count)!r}"
        )
    return count, None if names in ((), _unnamed(count)) else names


def _problem(labels: int) -> str:
    return "regression" if labels == 1 else "single_label_classification"


def _unnamed(labels: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(labels))


def config_to_hf(config: RobertaConfig) -> dict[str, Any]:
    """The fields of a config.json, but for the dtype."""
    names = config.label_names or _unnamed(config.labels)
    return {
        "architectures": [CLASSES[config.model_type] + WITH_HEAD],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab,
        "pad_token_id": config.pad_id,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "initializer_range": config.init_scale,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": _problem(config.labels),
    }


def _leaves(config: RobertaConfig) -> list[Leaf]:
    return hf_files.leaves_of(jax.eval_shape(roberta.initializer(config, 0)[1]), _MODULES)


def read_config(folder: str | os.PathLike, labels: int | None = None) -> tuple[RobertaConfig, bool]:
    """The shape of the model in a folder, and whether it has a head: see `config_from_hf`."""
    path = pathlib.Path(folder) / CONFIG
    return config_from_hf(read_json(path), str(path), labels)


def load_hf(
    folder: str | os.PathLike,
    param_dtype: str | None = None,
    *,
    labels: int | None = None,
    seed: int = 0,
) -> tuple[RobertaConfig, dict[str, Any]]:
    """The model in a folder: its shape, and its parameters as `roberta.initializer` lays them out.

    They are arrays of numpy, filled tensor by tensor.

    Args:
      folder: has config.json and model.safetensors, or several files and their index.
      param_dtype: of the parameters and of the activations; by default the checkpoint's.
      labels: how many the head has; of a model without a head it has to be said.
      seed: of a new head.

    Raises:
      UserError: a file, a field or a tensor is missing, damaged, of another shape or unknown, or
        the head has another number of labels.
    """
    folder = pathlib.Path(folder)
    (config, with_head), tensors = read_config(folder, labels), hf_files.Tensors(folder)
    if labels is None and not with_head:
        raise UserError(
            f"{folder / CONFIG}: it is of a model without a classifier. Say how many labels the"
            " new one shall have."
        )
    leaves = [leaf for leaf in _leaves(config) if with_head or leaf.path[0] != "classifier"]
    dtype, left = tensors.check(leaves)
    hf_files.refuse({name: path for name, path in left.items() if name not in _DROPPED})
    dtype = param_dtype or dtype
    config = dataclasses.replace(config, param_dtype=dtype, dtype=dtype)
    params = tensors.params(leaves, dtype)
    if not with_head:
        print(f"{folder}: its classifier is new, for {config.labels} labels, from seed {seed}.")
        head = nnx.state(roberta.Classifier(config, nnx.Rngs(seed)), nnx.Param)
        params["classifier"] = jax.tree.map(np.asarray, nnx.to_pure_dict(head))
    return config, params


def save_hf(
    folder: str | os.PathLike,
    config: RobertaConfig,
    params: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model into a new folder that `transformers` loads: see `hf_files.save`."""
    hf_files.save(folder, _leaves(config), params, config_to_hf(config), file_bytes)
