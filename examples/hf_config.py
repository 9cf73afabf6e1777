"""A `config.json` of Hugging Face, to a `LlamaConfig` and back.

Every field is read, or listed as one that changes nothing here; any other is refused. What stands
where a field is missing is what `transformers` would take, but for the sizes, which must be there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples import hf_fields, rope
from examples.errors import UserError
from examples.hf_fields import Fields
from examples.llama_config import LlamaConfig

SCALINGS = {
    **{"linear": rope.Linear, "dynamic": rope.Dynamic},
    **{"yarn": rope.Yarn, "llama3": rope.Llama3},
}
SLIDING, FULL = "sliding_attention", "full_attention"

# What each architecture knows beside what all know.
ARCHITECTURES = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    "qwen3": {
        *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        "attention_bias",
    },
    "smollm3": {
        *("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        *("use_sliding_window", "sliding_window", "layer_types"),
    },
}
CLASSES = {
    **{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    **{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"},
}

IRRELEVANT = hf_fields.IRRELEVANT | {
    *("pretraining_tp", "is_llama_config", "unsloth_fixed", "unsloth_version"),
    "max_window_layers",  # In SmolLM3, whose layers do not go by it.
}
# They would change something, so they may stand there with these values alone.
NEUTRAL = hf_fields.NEUTRAL | {
    **{"attention_dropout": 0, "hidden_dropout": 0, "partial_rotary_factor": 1},
    **{"rope_interleaved": False, "tie_last_hidden_states": None, "per_layer_config": None},
    **{"attention_bias": False, "mlp_bias": False},  # Of architectures that do not read them.
}


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """The shape that the fields of a config.json describe.

    Args:
      fields: what JSON made of the file.
      source: the file, for errors.

    Raises:
      UserError: a field is missing, of no known name, or of a value that the model has no place
        for.
    """
    given = Fields(fields, source)
    kind = given.take("model_type", str)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise given.refuse("model_type", f"{kind!r} is none of the known ones, {known}")
    classes = given.take("architectures", list, [CLASSES[kind]])
    if classes != [CLASSES[kind]]:
        raise given.refuse("architectures", f"is {classes!r}, not ['{CLASSES[kind]}']")
    layers = given.take("num_hidden_layers", int, smallest=1)
    heads = given.take("num_attention_heads", int, smallest=1)
    bias = "attention_bias" in ARCHITECTURES[kind] and given.take("attention_bias", bool, False)
    own = 128 if kind == "qwen3" else None
    activation = given.activation("silu")
    theta, scaling = _rope(given, 2e6 if kind == "smollm3" else 1e4)
    rope_layers = _rope_layers(given, layers) if kind == "smollm3" else None
    window, sliding_layers = _windows(given, kind, layers, rope_layers)
    settings = {
        "vocab_size": given.take("vocab_size", int, smallest=1),
        "hidden": given.take("hidden_size", int, smallest=1),
        "intermediate": given.take("intermediate_size", int, smallest=1),
        "heads": heads,
        "layers": layers,
        # Llama's first configs came before grouped queries.
        "kv_heads": given.take(
            "num_key_value_heads", int, heads if kind == "llama" else ..., smallest=1
        ),
        "tied": given.take("tie_word_embeddings", bool, kind == "smollm3"),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "max_positions": given.take("max_position_embeddings", int, smallest=1),
        "rope_layers": rope_layers,
        "sliding_window": window,
        "sliding_layers": sliding_layers,
        "qkv_bias": kind == "qwen2" or bias,
        "out_bias": bias,
        "qk_norm": kind == "qwen3",
        "activation": activation,
        "norm_eps": float(given.take("rms_norm_eps", float, 1e-6)),
        "init_scale": float(given.take("initializer_range", float, 0.02)),
        "head_dim": given.take("head_dim", int, own, smallest=2),
    }
    if "mlp_bias" in ARCHITECTURES[kind]:
        settings["mlp_bias"] = given.take("mlp_bias", bool, False)
    given.refuse_rest(kind, NEUTRAL, IRRELEVANT)
    try:
        return LlamaConfig(**settings)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _rope(given: Fields, default_theta: float) -> tuple[float, rope.Scaling | None]:
    """Theta and scaling, in the words of `transformers` before its version 5 or since."""
    theta = given.take("rope_theta", float, None, smallest=1)
    name = "rope_scaling" if given.left.get("rope_scaling") else "rope_parameters"
    found = given.take(name, dict, {})
    other = "rope_parameters" if name == "rope_scaling" else "rope_scaling"
    if given.take(other, dict, {}):
        raise given.refuse(name, f"stands beside {other}: leave one of them")
    inner = Fields(found, f"{given.source}: {name}")
    inner_theta = inner.take("rope_theta", float, theta or default_theta, smallest=1)
    if theta not in (None, inner_theta):
        raise inner.refuse("rope_theta", f"is {inner_theta}, and outside {theta}")
    kinds = {inner.left.pop(key) for key in ("rope_type", "type") if key in inner.left}
    kind = kinds.pop() if len(kinds) == 1 else ("default" if not kinds else sorted(kinds))
    if inner.left.get("partial_rotary_factor") == 1:
        del inner.left["partial_rotary_factor"]
    if kind == "default":
        scaling, known = None, {}
    elif kind in SCALINGS:
        known = {field.name: field for field in dataclasses.fields(SCALINGS[kind])}
        values = {}
        for key, field in known.items():
            required = field.default is dataclasses.MISSING
            typed = {bool: bool, "bool": bool}.get(field.type, float)
            smallest = 1 if key in ("factor", "original_max_position_embeddings") else None
            values[key] = inner.take(key, typed, ... if required else field.default, smallest)
        scaling = SCALINGS[kind](**values)
    else:
        raise inner.refuse("rope_type", f"{kind!r} is none of default, {', '.join(SCALINGS)}")
    for key in inner.left:
        raise inner.refuse(key, f"is a field that is not known of {kind!r}")
    return inner_theta, scaling


def _rope_layers(given: Fields, layers: int) -> tuple[bool, ...] | None:
    interval = given.take("no_rope_layer_interval", int, 4, smallest=1)
    found = given.layers("no_rope_layers", layers, (0, 1))
    if found is None:
        found = [(i + 1) % interval for i in range(layers)]
    return None if all(found) else tuple(map(bool, found))


def _windows(
    given: Fields, kind: str, layers: int, rope_layers: tuple[bool, ...] | None
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window, and the layers that have it where not all do."""
    if "sliding_window" not in ARCHITECTURES[kind]:
        return None, None
    if kind == "mistral":
        written = "sliding_window" in given.left  # A null says that there is none.
        return given.take("sliding_window", int, None if written else 4096, smallest=1), None
    window = given.take("sliding_window", int, 4096 if kind != "smollm3" else None, smallest=1)
    window = window if given.take("use_sliding_window", bool, False) else None
    first = given.take("max_window_layers", int, 28) if kind != "smollm3" else 0
    types = given.layers("layer_types", layers, (SLIDING, FULL))
    if types is not None:
        sliding = [entry == SLIDING for entry in types]
    elif kind == "smollm3":
        sliding = [window is not None and not turned for turned in rope_layers or [True] * layers]
    else:
        sliding = [window is not None and i >= first for i in range(layers)]
    if any(sliding) and window is None:
        raise given.refuse("layer_types", f"has {SLIDING!r}, without a sliding_window that is used")
    if not any(sliding):
        return None, None
    return window, None if all(sliding) else tuple(sliding)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a config.json, but for the dtype.

    Of the architectures that can be this model the first in `ARCHITECTURES`.
    """
    fields: dict[str, Any] = {
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_scale,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # Else a default of the architecture, perhaps beyond the vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    # Versions before 5 read the first two, later ones too.
    fields |= {"rope_theta": config.rope_theta, "rope_scaling": None}
    for name, scaling in SCALINGS.items():
        if isinstance(config.rope_scaling, scaling):
            values = {k: v for k, v in vars(config.rope_scaling).items() if v is not None}
            fields["rope_scaling"] = {"rope_type": name} | values
    kind = _architecture(config)
    sliding = config.sliding_layers or (config.sliding_window is not None,) * config.layers
    own = {
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": [SLIDING if s and config.sliding_window else FULL for s in sliding],
        "no_rope_layers": [int(r) for r in config.rope_layers or (True,) * config.layers],
    }
    fields |= {name: own[name] for name in own if name in ARCHITECTURES[kind]}
    return {"architectures": [CLASSES[kind]], "model_type": kind} | fields


def _architecture(config: LlamaConfig) -> str:
    """The architecture that is this model."""
    mixed = config.sliding_window is not None and config.sliding_layers is not None
    turned = config.rope_layers is None or all(config.rope_layers)
    needs = {
        "a sliding_window": config.sliding_window is not None,
        "sliding_layers": mixed,
        "rope_layers": not turned,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
    }
    has = {name for name, needed in needs.items() if needed}
    windows, biases = {"a sliding_window", "sliding_layers"}, {"qkv_bias", "out_bias"}
    both = config.qkv_bias == config.out_bias
    if both and has <= biases | {"mlp_bias"}:
        return "llama"
    if has <= {"a sliding_window"}:
        return "mistral"
    if config.qkv_bias and has <= windows | {"qkv_bias"}:
        return "qwen2"
    if config.qk_norm and both and has <= windows | biases | {"qk_norm"}:
        return "qwen3"
    if both and has <= windows | biases | {"mlp_bias", "rope_layers"}:
        return "smollm3"
    raise UserError(
        f"No architecture of {', '.join(ARCHITECTURES)} has {', '.join(sorted(has))} together."
    )
