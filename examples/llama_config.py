"""The shape of a LLaMA, and of the models that descend from it."""

import dataclasses
import functools

import jax

from examples import rope

# By their names in Hugging Face's configs.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and number formats of a model. `kv_heads=None` gives every query head its own."""

    vocab_size: int = 32000
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    layers: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None  # Channels of a head; by default hidden / heads.
    tied: bool = False  # The head is the transposed embedding.
    rope_theta: float = 10000.0
    rope_scaling: rope.Scaling | None = None
    max_positions: int = 2048  # The model's own length, for its rope_scaling; no limit here.
    rope_layers: tuple[bool, ...] | None = None  # Which layers see positions; by default all.
    sliding_window: int | None = None  # Positions that a token sees; by default all up to it.
    sliding_layers: tuple[bool, ...] | None = None  # In which layers; by default in all.
    qkv_bias: bool = False
    out_bias: bool = False  # Of the attention.
    mlp_bias: bool = False
    qk_norm: bool = False  # Queries and keys of a head are normalised.
    activation: str = "silu"  # One of ACTIVATIONS.
    norm_eps: float = 1e-6
    init_scale: float = 0.02
    param_dtype: str = "float32"
    dtype: str = "float32"  # Of activations; statistics and the softmax are float32 always.
    remat: bool = False  # Recompute each block's activations in the backward pass.
    loss_chunk: int = 2**25  # Most logits at once in `Llama.losses`: 128 MiB.
    # Of a batch on a mesh. Left to itself, XLA cuts activations as the weights rather.
    batch_sharding: jax.sharding.NamedSharding | None = None

    def __post_init__(self):
        if (self.head_dim is None and self.hidden % self.heads) or self.head_size % 2:
            raise ValueError(
                f"hidden={self.hidden} must be heads={self.heads} times an even head size."
                if self.head_dim is None
                else f"head_dim={self.head_dim} must be even."
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        for name in ("rope_layers", "sliding_layers"):
            given = getattr(self, name)
            if given is not None and len(given) != self.layers:
                raise ValueError(f"{name} has {len(given)} entries for layers={self.layers}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}."
            )

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, given or not."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Channels of a head, given or not."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def layers_alike(self) -> bool:
        """Whether all layers compute the same, with weights of their own."""
        return len(set(self.rope_layers or [True])) == len(set(self.sliding_layers or [True])) == 1
