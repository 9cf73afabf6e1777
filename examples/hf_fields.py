"""The fields of a `config.json` of Hugging Face, each to be read, or known to change nothing."""

from collections.abc import Mapping
from typing import Any

from examples.errors import UserError
from examples.llama_config import ACTIVATIONS

# Of generation, of files, of programs: they change no logits.
IRRELEVANT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
    *("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("_name_or_path", "_model_name_or_path", "name_or_path"),  # The second by a GGUF.
    *("transformers_version", "transformers.js_config"),
    *("torch_dtype", "dtype", "attn_implementation", "_attn_implementation"),
    "_attn_implementation_autoset",
}
# They would change something, so they may stand there with these values alone.
NEUTRAL = {
    **{"chunk_size_feed_forward": 0, "is_encoder_decoder": False, "quantization_config": None},
}


class Fields:
    """The fields of a config that are still to be read."""

    def __init__(self, fields: Mapping[str, Any], source: str):
        self.left, self.source = dict(fields), source

    def refuse(self, name: str, why: str) -> UserError:
        """The error of a field."""
        return UserError(f"{self.source}: {name} {why}.")

    def take(self, name: str, kind: type, default: Any = ..., smallest: float | None = None) -> Any:
        """A field's value, checked; the default where it is missing or null."""
        value = self.left.pop(name, None)
        if value is None:
            if default is ...:
                raise self.refuse(name, "is missing")
            return default
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        right = numeric if kind is float else isinstance(value, kind)
        if not right or (kind is int and isinstance(value, bool)):
            raise self.refuse(name, f"is {value!r}, not of type {kind.__name__}")
        if smallest is not None and not value >= smallest:
            raise self.refuse(name, f"is {value}, less than {smallest}")
        return value

    def layers(self, name: str, count: int, kinds: tuple[Any, Any]) -> list[Any] | None:
        """A field that has one of two values for each layer; None where it is missing."""
        values = self.take(name, list, None)
        # SmolLM3 permits entries for more layers than there are.
        if values is not None and (len(values) < count or any(v not in kinds for v in values)):
            raise self.refuse(name, f"must have {kinds[0]!r} or {kinds[1]!r} for {count} layers")
        return values and values[:count]

    def activation(self, default: str) -> str:
        """The name of the activation in `ACTIVATIONS`."""
        given = self.take("hidden_act", str, default)
        name = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}.get(given, given)
        if name not in ACTIVATIONS:
            raise self.refuse("hidden_act", f"{name!r} is none of {', '.join(ACTIVATIONS)}")
        return name

    def refuse_rest(self, kind: str, neutral: Mapping[str, Any], irrelevant: set[str]) -> None:
        """Refuses what is still to be read.

        Args:
          kind: the architecture.
          neutral: fields that may stand there with one value, or null.
          irrelevant: fields that may have any.
        """
        for name, value in neutral.items():
            found = self.left.pop(name, None)
            if found is not None and found != value:
                raise self.refuse(name, f"is {found!r}, which the model has no place for")
        for name in self.left:
            if name not in irrelevant:
                raise self.refuse(name, f"is a field that is not known of {kind!r}")
