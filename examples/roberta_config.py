"""The shape of a RoBERTa with a head on its first token."""

import dataclasses

from examples.llama_config import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class RobertaConfig:
    """Shape, dropout and number formats of a model; by default roberta-base's."""

    vocab_size: int = 50265
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    layers: int = 12
    max_positions: int = 514  # Rows of the table; those up to pad_id are of no token.
    type_vocab: int = 1  # Rows of the table of segments, of which all tokens have the first.
    pad_id: int = 1
    norm_eps: float = 1e-5
    activation: str = "gelu"  # One of ACTIVATIONS.
    labels: int = 2  # 1 is regression.
    label_names: tuple[str, ...] | None = None
    dropout: float = 0.1  # Of embeddings, and of what each layer adds.
    attention_dropout: float = 0.1  # Of attention's weights.
    classifier_dropout: float | None = None  # By default `dropout`.
    init_scale: float = 0.02
    param_dtype: str = "float32"
    dtype: str = "float32"  # Of activations; statistics and the softmax are float32 always.
    remat: bool = False  # Recompute each block's activations in the backward pass.
    model_type: str = "roberta"  # Or xlm-roberta, the same model beside another tokenizer.

    def __post_init__(self):
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} must be a multiple of heads={self.heads}.")
        if self.labels < 1:
            raise ValueError(f"labels={self.labels} must be 1, for regression, or more.")
        if self.label_names is not None and len(self.label_names) != self.labels:
            raise ValueError(
                f"label_names has {len(self.label_names)} entries for labels={self.labels}."
            )
        if not 0 <= self.pad_id < min(self.vocab_size, self.max_positions - 1):
            raise ValueError(
                f"pad_id={self.pad_id} must be a token of vocab_size={self.vocab_size} and leave"
                f" positions of max_positions={self.max_positions}."
            )
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} must be at least 0 and less than 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}."
            )

    @property
    def max_length(self) -> int:
        """Tokens that there are positions for."""
        return self.max_positions - self.pad_id - 1

    @property
    def head_dropout(self) -> float:
        """Dropout of the head, given or not."""
        return self.dropout if self.classifier_dropout is None else self.classifier_dropout
