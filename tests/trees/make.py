"""Writes the parameter trees of real models, one JSON file each, beside this script.

    python tests/trees/make.py FAMILY...

Shapes come from the packages' own models by `jax.eval_shape`: nothing is allocated, nothing is
downloaded, and no code of theirs is kept here. Widths are the published ones; layers that are not
stacked are cut to a few. A family needs its packages, which one environment does not hold all:

- `example`: this repository, and flax.
- `tunix`: google-tunix. `haiku`: dm-haiku. `equinox`: equinox. `flax`: flax. `core`: flax.
  `flax` also needs the folder `examples` of flax's source distribution, as FLAX_EXAMPLES, and
  jaxtyping.
- `maxtext`: maxtext, whose wheel requires nothing by itself: jax flax optax orbax-checkpoint aqtp
  qwix omegaconf pydantic jinja2 sympy psutil pyyaml tokenizers transformers tokamax packaging
  etils pathwaysutils grain drjax pillow tiktoken sentencepiece.
- `gemma`: gemma, `sentencepiece<0.2.1`.
- `hf`, `diffusers`: transformers==4.52.4 diffusers==0.35.2 flax==0.10.7 jax==0.6.0, as newer ones
  have no Flax models.

What each file says of a leaf, beside its shape, is read off a table: rows of a pattern of paths, a
kind, and the einsum that the module's source applies to the leaf, with L for stacked layers and a
layer's own letters elsewhere. The first pattern that matches a whole path counts, and each leaf
has to have one. From the einsum follow

- `axes`: reduction axes (in the input, summed over) and output axes (of the output alone); the
  remaining ones are in input and output both: a stack of matrices.
- `packed`: output axes that only tell maps of one input apart, as of query, key and value in one
  kernel: behind a bar in the table. A rule may take them for a stack.

`kind` says what a leaf is that is no plain kernel. Heads, routers and convolutions have axes too.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent
Row = tuple[str, str | None, str | None]  # pattern of paths, kind, einsum


class Model(NamedTuple):
    """A model's parameters, the rows that explain them, the packages that made them."""

    name: str
    params: Any
    rows: Sequence[Row]
    packages: Sequence[str]


def axes(einsum: str) -> tuple[list[int], list[int], list[int]]:
    """Reduction, output and packed axes of the weight, an einsum's second operand."""
    equation, _, packed = einsum.partition("|")
    operands, out = equation.split("->")
    x, weight = operands.split(",")
    letters = list(enumerate(weight))
    reduction = [i for i, a in letters if a in x and a not in out]
    output = [i for i, a in letters if a in out and a not in x]
    stacked = [i for i, a in letters if a in out and a in x]
    assert len(reduction) + len(output) + len(stacked) == len(set(weight)) == len(weight), einsum
    assert reduction and output and set(packed) <= {weight[i] for i in output}, einsum
    return reduction, output, [i for i, a in letters if a in packed]


def leaves(params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """By path the shapes and dtypes of a tree's arrays."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in found
        if hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)
    }


def explain(path: str, ndim: int, rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """The kind and the einsum of the first row that matches a path."""
    for pattern, kind, einsum in rows:
        if re.fullmatch(pattern, path):
            weight = einsum and einsum.split("->")[0].split(",")[1]
            assert weight is None or len(weight) == ndim, f"{path} of {ndim} axes: {einsum}"
            return kind, einsum
    raise LookupError(f"no row for {path} of {ndim} axes")


def described(model: Model) -> dict[str, Any]:
    """What a model's file holds."""
    found = leaves(model.params)
    dtypes = [str(x.dtype) for x in found.values()]
    usual = max(sorted(set(dtypes)), key=dtypes.count)
    result: dict[str, Any] = {
        "model": model.name,
        "made with": {p: importlib.metadata.version(p) for p in model.packages},
        "dtype": usual,
        "leaves": {path: list(x.shape) for path, x in found.items()},
        "dtypes": {path: str(x.dtype) for path, x in found.items() if str(x.dtype) != usual},
        "axes": {},
        "packed": {},
        "kind": {},
    }
    for path, x in found.items():
        kind, einsum = explain(path, len(x.shape), model.rows)
        if kind:
            result["kind"][path] = kind
        if einsum:
            reduction, output, packed = axes(einsum)
            result["axes"][path] = [reduction, output]
            if packed:
                result["packed"][path] = packed
    return {key: value for key, value in result.items() if value != {}}


def compact(tree: dict[str, Any]) -> str:
    """JSON of one leaf a line."""

    def value(x):
        if not isinstance(x, dict):
            return json.dumps(x)
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in x.items()) + "}"

    return "{\n" + ",\n".join(f"{json.dumps(k)}: {value(v)}" for k, v in tree.items()) + "\n}\n"


def write(model: Model) -> None:
    """Writes a model's file and says so."""
    tree = described(model)
    (FOLDER / f"{model.name}.json").write_text(compact(tree))
    counts = {key: len(tree.get(key, ())) for key in ("leaves", "axes", "packed", "kind")}
    print(model.name, *(f"{n} {key}" for key, n in counts.items()))


# Rows that models share.

NORM: Row = (r".*norm\w*/(scale|w|weight)", "norm", None)
NORM_BIAS: Row = (r".*norm\w*/bias", "bias", None)
BIAS: Row = (r".*bias", "bias", None)


def kernel(pattern: str, einsum: str = "BI,IO->BO") -> Row:
    """A row of a map's weight, plain if not told otherwise."""
    return pattern, None, einsum


def under(prefix: str, rows: Sequence[Row]) -> list[Row]:
    """Rows for the paths that begin so."""
    return [(f"{prefix}(?:{pattern})", kind, einsum) for pattern, kind, einsum in rows]


def stack(rows: Sequence[Row], at: int = 0) -> list[Row]:
    """Rows of layers for the same layers stacked, along that axis of each weight."""

    def stacked(einsum):
        equation, bar, packed = einsum.partition("|")
        operands, out = equation.split("->")
        x, w = operands.split(",")
        return f"L{x},{w[:at]}L{w[at:]}->L{out}{bar}{packed}"

    return [(pattern, kind, einsum and stacked(einsum)) for pattern, kind, einsum in rows]


# This repository's example.

EXAMPLE: list[Row] = [
    NORM,
    ("embed/embedding", "embedding", None),
    ("lm_head/kernel", "head", "BI,IO->BO"),
    *stack([kernel("blocks/.*/kernel")]),
]


def nnx_params(make: Callable[[], Any]) -> Any:
    """A pure tree of the parameters that an NNX model would have."""
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def example() -> Iterator[Model]:
    """The example LLaMA, blocks stacked along the first axis."""
    sys.path.insert(0, str(FOLDER.parent.parent))
    from flax import nnx

    from examples import llama

    for size in ("60m", "7b"):
        make = functools.partial(llama.Llama, llama.CONFIGS[size])
        params = nnx_params(lambda make=make: make(nnx.Rngs(0)))
        yield Model(f"example-llama-{size}", params, EXAMPLE, ["flax", "jax"])


# Tunix: its Einsum layers' own strings.

GEMMA_ATTENTION: list[Row] = [
    kernel(".*attn/attn_vec_einsum/w", "BTNH,NHD->BTD"),
    kernel(".*attn/qkv_einsum/w", "BTD,SNDH->SBTNH|S"),
    kernel(".*attn/q_einsum/w", "BTD,NDH->BTNH"),
    kernel(".*attn/kv_einsum/w", "BSD,CKDH->CBSKH|C"),
    kernel(".*attn/k_einsum/w", "BSD,KDH->BSKH"),
]
TUNIX: list[Row] = [
    NORM,
    NORM_BIAS,
    (r".*/ln\d/scale", "norm", None),
    ("embedder/(per_layer_)?input_embedding", "embedding", None),
    (r".*pos_embedding", "position", None),
    (r".*(skip_scale|router_scale|per_expert_scale)", "vector", None),
    ("lm_head/w", "head", "BTD,DV->BTV"),
    ("score/kernel", "head", "BI,IO->BO"),
    (".*moe/router_logits", "router", "GSD,DE->GSE"),
    (".*mlp/router/kernel", "router", "BI,IO->BO"),
    kernel(".*moe/gating_einsum", "GECD,EKFD->KGECF|K"),
    kernel(".*moe/linear", "GECF,EFD->GECD"),
    kernel(r"layers/\d+/mlp/(gate_proj|up_proj)", "EBD,EDF->EBF"),
    kernel(r"layers/\d+/mlp/down_proj", "EBF,EFD->EBD"),
    (".*siglip_encoder/embedding/kernel", "conv", "BHWI,HWIO->BO"),
    *GEMMA_ATTENTION,
    kernel("embedder/mm_input_projection/w", "TM,MD->TD"),
    kernel("embedder/per_layer_model_projection/w", "BTD,DNP->BTNP|N"),
    kernel(".*per_layer_input_gate/w", "BTD,DP->BTP"),
    kernel(".*per_layer_projection/w", "BTP,PD->BTD"),
    kernel(r".*attn/[qkv]_proj/w", "BTD,DNH->BTNH"),
    kernel(r".*attn/o_proj/w", "BTNH,NHD->BTD"),
    kernel(".*/kernel"),
    BIAS,
]


def tunix() -> Iterator[Model]:
    """Tunix's language models, a few layers each."""
    from flax import nnx

    def module(name):
        return importlib.import_module(f"tunix.models.{name}.model")

    def few(config, layers):
        return dataclasses.replace(config, num_layers=layers)

    def model(name, of, config):
        params = nnx_params(lambda: of(config, rngs=nnx.Rngs(0)))
        return Model(f"tunix-{name}", params, TUNIX, ["google-tunix", "flax", "jax"])

    gemma, gemma3, gemma4 = module("gemma"), module("gemma3"), module("gemma4")
    for name in ("gemma_2b", "gemma_7b", "gemma2_2b"):
        config = getattr(gemma.ModelConfig, name)()
        yield model(name, gemma.Gemma, few(config, 2))
    seeing = few(gemma3.ModelConfig.gemma3_4b_pt(text_only=False), 2)
    vision = dataclasses.replace(seeing.vision_config, depth=2)
    seeing = dataclasses.replace(seeing, vision_config=vision)
    yield model("gemma3_1b", gemma3.Gemma3, few(gemma3.ModelConfig.gemma3_1b_pt(), 2))
    yield model("gemma3_4b", gemma3.Gemma3, seeing)
    # A whole period of its attention pattern: global layers have other shapes.
    yield model("gemma4_e2b", gemma4.Gemma4, few(gemma4.ModelConfig.gemma4_e2b(), 5))
    yield model("gemma4_26b_a4b", gemma4.Gemma4, few(gemma4.ModelConfig.gemma4_26b_a4b(), 6))
    for package, of, names in (
        ("llama3", "Llama3", ("llama3p2_1b", "llama3p1_8b")),
        ("qwen2", "Qwen2", ("qwen2p5_0p5b",)),
        ("qwen3", "Qwen3", ("qwen3_0p6b", "qwen3_30b_a3b")),
    ):
        for name in names:
            config = getattr(module(package).ModelConfig, name)()
            yield model(name, getattr(module(package), of), few(config, 2))


# MaxText: a kernel of its DenseGeneral has the input axes, then the output axes; a scan puts the
# layers second (`param_scan_axis: 1`), whatever comes first: experts and heads too.

MAXTEXT_OUTER: list[Row] = [
    NORM,
    (".*_bias|.*/bias", "bias", None),
    (".*/sinks", "vector", None),
    ("token_embedder/embedding", "embedding", None),
    ("decoder/position_embedder/embedding", "position", None),
    ("decoder/logits_dense/kernel", "head", "BI,IO->BO"),
]
MAXTEXT_LAYER: list[Row] = [
    (".*/gate/kernel", "router", "BD,DE->BE"),
    kernel(r".*(MoeBlock_0|GptOssMlp)/wi_\d", "EBD,EDF->EBF"),
    kernel(".*(MoeBlock_0|GptOssMlp)/wo", "EBF,EFD->EBD"),
    kernel(r".*(mlp|shared_experts)/(wi_\d|wo)/kernel"),
    kernel(".*mlp/wi/kernel"),
    kernel(".*/(query|key|value|wq_b|wkv_b)/kernel", "BTD,DNH->BTNH"),
    kernel(".*/(wq_a|wkv_a)/kernel", "BTD,DR->BTR"),
    kernel(".*/qkv_proj/kernel", "BTD,DSNH->BTSNH|S"),
    kernel(".*/out/kernel", "BTNH,NHD->BTD"),
]
# Gates and values lie in one kernel, and heads of queries, keys and values along one axis.
MAXTEXT_FUSED: list[Row] = [
    kernel(".*mlp/wi/kernel", "BTD,DKF->BTKF|K"),
    kernel(".*/qkv_proj/kernel", "BTD,DNH->BTNH"),
    *MAXTEXT_LAYER,
]


def maxtext() -> Iterator[Model]:
    """MaxText's decoders, most with scanned layers."""
    import maxtext as package
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh
    from maxtext.configs import pyconfig
    from maxtext.models import models

    base = pathlib.Path(package.__file__).parent / "configs" / "base.yml"
    still = ["run_name=shapes", "hardware=cpu", "skip_jax_distributed_system=true"]

    def model(file, name, rows, *options):
        config = pyconfig.initialize(["", str(base), *still, f"model_name={name}", *options])
        mesh = Mesh(np.array(jax.devices()).reshape([1] * len(config.mesh_axes)), config.mesh_axes)
        params = nnx_params(lambda: models.Transformer(config, mesh, None, rngs=nnx.Rngs(0)))
        return Model(f"maxtext-{file}", params, rows, ["maxtext", "flax", "jax"])

    scanned = [*MAXTEXT_OUTER, *stack(MAXTEXT_LAYER, 1)]
    names = ("llama2-7b", "qwen3-0.6b", "gpt3-6b", "mixtral-8x7b", "deepseek2-16b", "gpt-oss-20b")
    for name in names:
        yield model(name, name, scanned)
    # Blocks of six layers are scanned, and four layers remain.
    rest = under("decoder/layers_remainder/", MAXTEXT_LAYER)
    rows = [*MAXTEXT_OUTER, *rest, *stack(MAXTEXT_LAYER, 1)]
    yield model("gemma3-4b", "gemma3-4b", rows)
    first = [*MAXTEXT_OUTER, *stack(MAXTEXT_LAYER)]
    yield model("llama2-7b-first", "llama2-7b", first, "param_scan_axis=0")
    fused = [*MAXTEXT_OUTER, *stack(MAXTEXT_FUSED, 1)]
    yield model("llama2-7b-fused", "llama2-7b", fused, "fused_qkv=true", "fused_mlp=true")
    loose = [*MAXTEXT_OUTER, *MAXTEXT_LAYER]
    few = ["scan_layers=false", "override_model_config=true", "base_num_decoder_layers=2"]
    yield model("mixtral-8x7b-loose", "mixtral-8x7b", loose, *few)


# google-deepmind/gemma (Linen): equations of its `_modules.py`; SigLIP is of Linen's own layers.

LINEN_ATTENTION: list[Row] = [
    (".*/(query|key|value)/bias", "bias", None),
    kernel(".*/(query|key|value)/kernel", "BTD,DNH->BTNH"),
    kernel(".*/out/kernel", "BTNH,NHD->BTD"),
]
GEMMA: list[Row] = [
    NORM,
    (r".*LayerNorm_\d/scale", "norm", None),
    BIAS,
    ("embedder/(per_layer_embeddings|(per_layer_)?input_embedding(_table)?)", "embedding", None),
    (".*pos_embedding", "position", None),
    (".*(skip_scale|router_scale|per_expert_scale|correct_output_scale)", "vector", None),
    (".*siglip_encoder/embedding/kernel", "conv", "BHWI,HWIO->BO"),
    (".*router_logits/w", "router", "GSD,DE->GSE"),
    (".*modality_router/w", "router", "BF,FD->BD"),
    kernel(".*altup/prediction_coefs", "BP,PIJ->BIJ"),
    kernel(".*altup/correction_coefs", "BP,PI->BI"),
    kernel(".*mlp/gating_einsum/w", "GECD,EKFD->KGECF|K"),  # of experts
    kernel(".*mlp/linear/w", "GECF,EFD->GECD"),
    kernel(".*mlp2?/linear", "BH,HF->BF"),
    *GEMMA_ATTENTION,
    kernel("embedder/mm_input_projection/w", "TM,MD->TD"),
    kernel("embedder/per_layer_(model|input)_projection/w", "BTD,DNP->BTNP|N"),
    kernel(".*per_layer_input_gate/w", "BTD,DP->BTP"),
    kernel(".*per_layer_projection/w", "BTP,PD->BTD"),
    kernel(r".*altup_(unembed_)?projection_\d(/altup_(unembed_)?projection_\d)?", "BF,FD->BD"),
    kernel(".*laurel/linear_left/w", "BTD,DR->BTR"),
    kernel(".*laurel/linear_right/w", "BTR,RD->BTD"),
    *under(".*siglip_encoder", LINEN_ATTENTION),
    kernel(r".*siglip_encoder.*/Dense_\d/kernel"),
]
# Which of the last two axes is the input is an option of the configuration.
GEMMA_PLAIN: list[Row] = [*GEMMA, kernel(".*mlp/gating_einsum", "BF,NFH->BNH|N")]
GEMMA_TRANSPOSED: list[Row] = [*GEMMA, kernel(".*mlp2?/gating_einsum", "BF,NHF->BNH|N")]


def gemma() -> Iterator[Model]:
    """google-deepmind/gemma, a period of each attention pattern."""
    from gemma import gm

    def model(name, layers, images=None, **options):
        of = getattr(gm.nn, name, None) or getattr(gm.nn.gemma4, name)
        config = of.config if hasattr(of, "config") else of().config
        types = tuple(config.attention_types)[:layers]
        config = dataclasses.replace(config, attention_types=types)
        if getattr(config, "kv_cache_sharing_config", None):  # It is for the whole depth.
            config = dataclasses.replace(config, kv_cache_sharing_config=None)
        if images is not None:
            eyes = config.vision_encoder
            eyes = eyes.clone(siglip_encoder=eyes.siglip_encoder.clone(depth=2))
            config = dataclasses.replace(config, vision_encoder=eyes)
        tokens = jnp.zeros((1, 8), jnp.int32)
        init = functools.partial(of(config=config, **options).init, images=images)
        params = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
        rows = GEMMA_TRANSPOSED if getattr(config, "transpose_gating_einsum", True) else GEMMA_PLAIN
        return Model(f"gemma-{name}", params, rows, ["gemma", "flax", "jax"])

    yield model("Gemma2_2B", 2)
    yield model("Gemma3_1B", 2)
    yield model("Gemma3_4B", 2, jnp.zeros((1, 1, 896, 896, 3), jnp.uint8))
    yield model("Gemma3n_E2B", 5, text_only=True)
    yield model("Gemma4_E2B", 5, text_only=True)
    yield model("Gemma4_26B_A4B", 6, text_only=True)


# Flax's own layers, in modules of ours. Its DenseGeneral: input axes, then output axes.

LINEN_BLOCK: list[Row] = [
    (r".*(LayerNorm_\d|_ln)/scale", "norm", None),
    *LINEN_ATTENTION,
    BIAS,
    kernel(".*mlp_(in|out)/kernel"),
]
LINEN: list[Row] = [
    ("Embed_0/embedding", "embedding", None),
    ("pos_embedding", "position", None),
    ("Dense_0/kernel", "head", "BI,IO->BO"),
]
CONVOLUTIONS: list[Row] = [
    (r".*(BatchNorm|GroupNorm|norm)\w*/scale", "norm", None),
    BIAS,
    (".*depthwise/kernel", "depthwise", None),
    ("head/kernel", "head", "BI,IO->BO"),
    (r".*/kernel|\w*[cC]onv\w*/kernel", "conv", "BHWI,HWIO->BO"),
]
PARTS: list[Row] = [
    BIAS,
    kernel("merge/kernel", "BTNH,NHD->BTD"),
    kernel("split/kernel", "BTD,DNH->BTNH"),
    kernel("by_group/kernel", "GBI,GIO->GBO"),
    kernel("einsum/kernel", "BTD,SNDH->SBTNH|S"),
    kernel("experts/kernel", "EBI,EIO->EBO"),
    kernel(r"(lstm|gru)/\w+/kernel"),
    kernel("lora/(kernel|lora/lora_[ab])"),
]
NNX_BLOCK: list[Row] = [
    (".*(norm|_ln)/scale", "norm", None),
    *LINEN_ATTENTION,
    BIAS,
    kernel(".*mlp_(in|out)/kernel"),
]
NNX: list[Row] = [
    ("embed/embedding", "embedding", None),
    ("head/kernel", "head", "BI,IO->BO"),
]


def linen_params(module: Any, *inputs: Any) -> Any:
    """The parameters that a Linen module would have, out of their boxes."""
    from flax import linen as nn

    return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def core_linen() -> Iterator[Model]:
    """Linen's attention, loose and scanned along two axes; convolutions; other layers."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(8, normalize_qk=True)(y, y)
            y = nn.gelu(nn.Dense(2048, name="mlp_in")(nn.LayerNorm()(x)))
            return x + nn.Dense(512, name="mlp_out")(y), None

    class Transformer(nn.Module):
        scan_axis: int | None

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(32000, 512)(tokens)
            place = nn.initializers.normal(0.02)
            x = x + self.param("pos_embedding", place, (1, 1024, 512))[:, : tokens.shape[1]]
            if self.scan_axis is None:
                for _ in range(2):
                    x, _ = Block()(x)
            else:
                stacked = nn.scan(
                    Block,
                    variable_axes={"params": self.scan_axis},
                    split_rngs={"params": True},
                    length=6,
                )
                x, _ = stacked(name="layers")(x, None)
            return nn.Dense(32000)(nn.LayerNorm()(x))

    class ConvNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(64, (7, 7), strides=2)(x))
            x = nn.Conv(64, (3, 3), feature_group_count=64, name="depthwise")(x)
            x = nn.GroupNorm()(nn.Conv(256, (1, 1), name="pointwise_conv")(x))
            x = nn.Conv(256, (3, 3), feature_group_count=32, name="grouped_conv")(x)
            x = nn.ConvTranspose(128, (4, 4), strides=(2, 2))(x)
            return nn.Dense(1000, name="head")(x.mean((1, 2)))

    class Parts(nn.Module):
        @nn.compact
        def __call__(self, x):  # (4, 16, 512)
            y = nn.DenseGeneral((8, 64), name="split")(x)
            x = nn.DenseGeneral(512, axis=(-2, -1), name="merge")(y)
            x = nn.DenseGeneral(768, batch_dims=0, name="by_group")(x)
            nn.Einsum((3, 8, 768, 64), "BTD,SNDH->SBTNH", use_bias=False, name="einsum")(x)
            expert = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            x = expert(512, name="experts")(x)[:, 0]
            for cell in (nn.LSTMCell(256, name="lstm"), nn.GRUCell(256, name="gru")):
                cell(cell.initialize_carry(jax.random.key(0), x.shape), x)
            return x

    tokens = jnp.zeros((1, 8), jnp.int32)
    for name, axis in (("loose", None), ("scan-0", 0), ("scan-1", 1)):
        block = LINEN_BLOCK if axis is None else under("layers/", stack(LINEN_BLOCK, axis))
        rows = [*LINEN, *block, *LINEN_BLOCK[:1], BIAS]
        params = linen_params(Transformer(axis), tokens)
        yield Model(f"core-linen-{name}", params, rows, ["flax", "jax"])
    params = linen_params(ConvNet(), jnp.zeros((1, 64, 64, 3)))
    yield Model("core-linen-conv", params, CONVOLUTIONS, ["flax", "jax"])
    params = linen_params(Parts(), jnp.zeros((4, 16, 512)))
    yield Model("core-linen-parts", params, PARTS, ["flax", "jax"])


def core_nnx() -> Iterator[Model]:
    """NNX's attention, loose and stacked; convolutions; other layers."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention_norm = nnx.LayerNorm(512, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                8, 512, normalize_qk=True, decode=False, rngs=rngs
            )
            self.mlp_norm = nnx.RMSNorm(512, rngs=rngs)
            self.mlp_in = nnx.Linear(512, 2048, rngs=rngs)
            self.mlp_out = nnx.Linear(2048, 512, rngs=rngs)

    class Transformer(nnx.Module):
        def __init__(self, stacked, rngs):
            self.embed = nnx.Embed(32000, 512, rngs=rngs)
            if stacked:
                self.layers = nnx.split_rngs(splits=6)(nnx.vmap(Block))(rngs)
            else:
                self.layers = nnx.List([Block(rngs) for _ in range(2)])
            self.final_norm = nnx.LayerNorm(512, rngs=rngs)
            self.head = nnx.Linear(512, 32000, use_bias=False, rngs=rngs)

    class ConvNet(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, rngs=rngs)
            self.norm1 = nnx.BatchNorm(64, rngs=rngs)
            self.depthwise = nnx.Conv(64, 64, (3, 3), feature_group_count=64, rngs=rngs)
            self.deconv = nnx.ConvTranspose(64, 128, (4, 4), rngs=rngs)
            self.norm2 = nnx.GroupNorm(128, rngs=rngs)
            self.head = nnx.Linear(128, 1000, rngs=rngs)

    class Parts(nnx.Module):
        def __init__(self, rngs):
            self.split = nnx.LinearGeneral(512, (8, 64), rngs=rngs)
            self.merge = nnx.LinearGeneral((8, 64), 512, axis=(-2, -1), rngs=rngs)
            self.einsum = nnx.Einsum("BTD,SNDH->SBTNH", (3, 8, 512, 64), rngs=rngs)
            self.lora = nnx.LoRALinear(512, 768, lora_rank=16, rngs=rngs)
            self.lstm = nnx.LSTMCell(512, 256, rngs=rngs)
            self.gru = nnx.GRUCell(512, 256, rngs=rngs)

    for name, stacked in (("loose", False), ("stacked", True)):
        block = under("layers/", stack(NNX_BLOCK) if stacked else NNX_BLOCK)
        params = nnx_params(lambda stacked=stacked: Transformer(stacked, nnx.Rngs(0)))
        yield Model(
            f"core-nnx-{name}", params, [*NNX, *block, *NNX_BLOCK[:1], BIAS], ["flax", "jax"]
        )
    params = nnx_params(lambda: ConvNet(nnx.Rngs(0)))
    yield Model("core-nnx-conv", params, CONVOLUTIONS, ["flax", "jax"])
    yield Model("core-nnx-parts", nnx_params(lambda: Parts(nnx.Rngs(0))), PARTS, ["flax", "jax"])


def core() -> Iterator[Model]:
    """Flax's layers."""
    yield from core_linen()
    yield from core_nnx()


# Flax's examples, out of its source distribution.

FLAX_GEMMA: list[Row] = [
    NORM,
    ("embedder/embedding", "embedding", None),
    kernel(".*attn/attn_vec_einsum/(w|kernel)", "BTNH,NHD->BTD"),
    kernel(".*attn/q_einsum/(w|kernel)", "BTD,NDH->BTNH"),
    kernel(".*attn/kv_einsum/(w|kernel)", "BTD,CKDH->CBTKH|C"),
    kernel(".*mlp/(gate_proj|up_proj|down_proj)/kernel"),
]
FLAX_SEQUENCES: list[Row] = [
    (r".*(LayerNorm_\d|norm)/scale", "norm", None),
    ("(.*/)?(Embed_0|shared_embedding)/embedding", "embedding", None),
    ("decoder/logitdense/kernel", "head", "BI,IO->BO"),
    *LINEN_ATTENTION,
    BIAS,
    kernel(r".*/Dense_\d/kernel"),
]
RESNET: list[Row] = [
    (r".*(bn_init|norm_proj|BatchNorm_\d)/scale", "norm", None),
    BIAS,
    ("Dense_0/kernel", "head", "BI,IO->BO"),
    (r".*conv_(init|proj)/kernel|.*Conv_\d/kernel", "conv", "BHWI,HWIO->BO"),
]


def from_example(folder: str, module: str) -> Any:
    """A module of one of Flax's examples, which import each other by bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(pathlib.Path(os.environ["FLAX_EXAMPLES"]) / folder))
    try:
        return importlib.import_module(module)
    finally:
        own = sys.path.pop(0)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(own):
                del sys.modules[name]


def flax() -> Iterator[Model]:
    """Flax's examples: Gemma (NNX), lm1b and wmt (Linen's attention), a residual network."""
    from flax import nnx

    packages = ["flax", "jax"]
    gemma = from_example("gemma", "transformer")
    for name in ("gemma2_2b", "gemma3_4b"):
        config = getattr(gemma.TransformerConfig, name)()
        types = tuple(config.attention_types)[:2]
        config = dataclasses.replace(config, num_layers=2, attention_types=types)
        params = nnx_params(lambda config=config: gemma.Transformer(config, rngs=nnx.Rngs(0)))
        yield Model(f"flax-{name}", params, FLAX_GEMMA, packages)
    tokens = jnp.zeros((1, 8), jnp.int32)
    few = dict(vocab_size=30000, output_vocab_size=30000, num_layers=2, deterministic=True)
    lm1b, wmt = from_example("lm1b", "models"), from_example("wmt", "models")
    params = linen_params(lm1b.TransformerLM(lm1b.TransformerConfig(**few)), tokens)
    yield Model("flax-lm1b", params, FLAX_SEQUENCES, packages)
    shared = wmt.TransformerConfig(**few, share_embeddings=True, logits_via_embedding=True)
    params = linen_params(wmt.Transformer(shared), tokens, tokens)
    yield Model("flax-wmt", params, FLAX_SEQUENCES, packages)
    imagenet = from_example("imagenet", "models")
    resnet = imagenet.ResNet([1, 1, 1, 1], imagenet.BottleneckResNetBlock, num_classes=1000)
    params = linen_params(resnet, jnp.zeros((1, 224, 224, 3)))
    yield Model("flax-resnet50", params, RESNET, packages)


# Haiku: weights (inputs, outputs), heads flat; a stack is of `layer_stack`, layers first.

HAIKU_BLOCK: list[Row] = [
    (r".*layer_norm\w*/scale", "norm", None),
    (".*/(b|offset)", "bias", None),
    kernel(r".*multi_head_attention\w*/(query|key|value|linear)/w"),
    kernel(r".*mlp\w*/~/linear_\d/w"),
]
HAIKU: list[Row] = [
    (".*embed/embeddings", "embedding", None),
    (".*pos_embs", "position", None),
    (".*/head/w", "head", "BI,IO->BO"),
]


def haiku() -> Iterator[Model]:
    """Haiku's attention, loose and under `layer_stack`; a residual network; recurrent cells."""
    import haiku as hk

    def block(x):
        def norm(x):
            return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

        init = hk.initializers.VarianceScaling(2.0)
        y = norm(x)
        x = x + hk.MultiHeadAttention(12, 64, w_init=init, model_size=768)(y, y, y)
        return x + hk.nets.MLP([3072, 768], activation=jax.nn.gelu)(norm(x))

    def transformer(tokens, stacked):
        x = hk.Embed(50257, 768)(tokens)
        place = hk.initializers.TruncatedNormal(0.02)
        x = x + hk.get_parameter("pos_embs", [1024, 768], init=place)[: tokens.shape[1]]
        x = hk.experimental.layer_stack(12)(block)(x) if stacked else block(block(x))
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True, name="layer_norm_f")(x)
        return hk.Linear(50257, name="head")(x)

    def params(function, *inputs):
        return jax.eval_shape(hk.transform_with_state(function).init, jax.random.key(0), *inputs)[0]

    def within(function):
        return lambda *args: hk.to_module(function)("transformer")(*args)

    tokens = jnp.zeros((1, 8), jnp.int32)
    for name, stacked in (("loose", False), ("stacked", True)):
        inside = under(".*layer_stack", stack(HAIKU_BLOCK)) if stacked else HAIKU_BLOCK
        rows = [*HAIKU, *inside, *HAIKU_BLOCK[:2]]
        tree = params(within(functools.partial(transformer, stacked=stacked)), tokens)
        yield Model(f"haiku-{name}", tree, rows, ["dm-haiku", "jax"])

    def convnet(image):
        x = hk.Conv2D(64, 7, stride=2)(image)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.DepthwiseConv2D(1, 3, name="depthwise")(x)
        x = hk.Conv2DTranspose(128, 4)(x)
        return hk.Linear(1000, name="head")(x.mean((1, 2)))

    rows = [
        (".*batch_norm/scale", "norm", None),
        (".*/(b|offset)", "bias", None),
        (".*depthwise/w", "depthwise", None),
        (".*head/w", "head", "BI,IO->BO"),
        (".*conv2_d/w", "conv", "BHWI,HWIO->BO"),
        (".*conv2_d_transpose/w", "conv", "BHWI,HWOI->BO"),
    ]
    tree = params(within(convnet), jnp.zeros((1, 64, 64, 3)))
    yield Model("haiku-conv", tree, rows, ["dm-haiku", "jax"])


# Equinox: weights (outputs, inputs), convolutions (outputs, inputs, height, width).

EQUINOX_BLOCK: list[Row] = [
    (r".*norm/weight", "norm", None),
    BIAS,
    kernel(r".*(_proj|mlp/layers/\d)/weight", "BI,OI->BO"),
]
EQUINOX: list[Row] = [
    ("embed/weight", "embedding", None),
    ("position", "position", None),
    ("head/weight", "head", "BI,OI->BO"),
]


def equinox() -> Iterator[Model]:
    """Equinox's attention, loose and stacked by `filter_vmap`; convolutions and cells."""
    import equinox as eqx

    class Block(eqx.Module):
        attention_norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        mlp_norm: eqx.nn.RMSNorm
        mlp: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.attention_norm = eqx.nn.LayerNorm(512)
            self.attention = eqx.nn.MultiheadAttention(8, 512, use_output_bias=True, key=first)
            self.mlp_norm = eqx.nn.RMSNorm(512)
            self.mlp = eqx.nn.MLP(512, 512, 2048, 1, jax.nn.gelu, key=second)

    class Transformer(eqx.Module):
        embed: eqx.nn.Embedding
        position: jax.Array
        layers: Any
        final_norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, stacked, key):
            keys = jax.random.split(key, 6)
            self.embed = eqx.nn.Embedding(32000, 512, key=key)
            self.position = jnp.zeros((1024, 512))
            self.layers = eqx.filter_vmap(Block)(keys) if stacked else [Block(k) for k in keys[:2]]
            self.final_norm = eqx.nn.LayerNorm(512)
            self.head = eqx.nn.Linear(512, 32000, use_bias=False, key=key)

    class Parts(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        depthwise: eqx.nn.Conv2d
        deconv: eqx.nn.ConvTranspose2d
        lstm: eqx.nn.LSTMCell
        gru: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 64, 7, key=key)
            self.norm = eqx.nn.GroupNorm(32, 64)
            self.depthwise = eqx.nn.Conv2d(64, 64, 3, groups=64, key=key)
            self.deconv = eqx.nn.ConvTranspose2d(64, 128, 4, key=key)
            self.lstm = eqx.nn.LSTMCell(128, 256, key=key)
            self.gru = eqx.nn.GRUCell(128, 256, key=key)
            self.head = eqx.nn.Linear(256, 1000, key=key)

    def params(make, *args):
        return eqx.filter_eval_shape(make, *args, jax.random.key(0))

    for name, stacked in (("loose", False), ("stacked", True)):
        inside = under("layers/", stack(EQUINOX_BLOCK) if stacked else EQUINOX_BLOCK)
        rows = [*EQUINOX, *inside, *EQUINOX_BLOCK[:2]]
        tree = params(functools.partial(Transformer, stacked))
        yield Model(f"equinox-{name}", tree, rows, ["equinox", "jax"])
    rows = [
        ("norm/weight", "norm", None),
        (".*bias(_n)?", "bias", None),
        ("depthwise/weight", "depthwise", None),
        ("head/weight", "head", "BI,OI->BO"),
        ("(conv|deconv)/weight", "conv", "BIHW,OIHW->BO"),
        kernel("(lstm|gru)/weight_(ih|hh)", "BI,OI->BO"),
    ]
    yield Model("equinox-parts", params(Parts), rows, ["equinox", "jax"])


# transformers' Flax models: Dense kernels (inputs, outputs), but GPT-2's, which are transposed.

HF: list[Row] = [
    (r".*(norm\w*|ln_\w+|LayerNorm|layernorm\w*|layrnorm)/(scale|weight)", "norm", None),
    (".*relative_attention_bias/embedding", "position", None),
    BIAS,
    (".*(wpe|position_embeddings?|embed_positions)(/embedding)?", "position", None),
    (".*embedding", "embedding", None),
    (".*(cls_token|class_embedding|logit_scale)", "vector", None),
    ("lm_head/kernel", "head", "BI,IO->BO"),
    ("classifier/kernel", "head", "BI,IO->BO"),
    (".*patch_embeddings/projection/kernel", "conv", "BHWI,HWIO->BO"),
    (".*encoder/conv[12]/kernel", "conv", "BWI,WIO->BO"),
]
HF_TRANSPOSED: list[Row] = [*HF, kernel(".*(c_attn|c_proj|c_fc)/kernel", "BI,OI->BO")]
HF_PLAIN: list[Row] = [*HF, kernel(".*/kernel")]


def hf() -> Iterator[Model]:
    """transformers' Flax models at their default or published sizes, two layers each."""
    import transformers as t

    packages = ["transformers", "flax", "jax"]
    smol = t.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,  # Published with a tied head, which Flax's LLaMA does not know.
    )
    whisper = t.WhisperConfig(encoder_layers=2, decoder_layers=2)
    for name, of, config, rows in (
        ("gpt2", "FlaxGPT2LMHeadModel", t.GPT2Config(n_layer=2), HF_TRANSPOSED),
        ("smollm2-135m", "FlaxLlamaForCausalLM", smol, HF_PLAIN),
        ("bert", "FlaxBertForMaskedLM", t.BertConfig(num_hidden_layers=2), HF_PLAIN),
        ("t5", "FlaxT5ForConditionalGeneration", t.T5Config(num_layers=2), HF_PLAIN),
        ("whisper", "FlaxWhisperForConditionalGeneration", whisper, HF_PLAIN),
        ("vit", "FlaxViTForImageClassification", t.ViTConfig(num_hidden_layers=2), HF_PLAIN),
    ):
        params = getattr(t, of)(config, _do_init=False).params_shape_tree
        yield Model(f"hf-{name}", params, rows, packages)


# diffusers' Flax UNet.

UNET: list[Row] = [
    (r".*norm\w*/scale", "norm", None),
    BIAS,
    (r".*(conv\w*|proj_in|proj_out)/kernel", "conv", "BHWI,HWIO->BO"),
    kernel(".*/kernel"),
]


def diffusers() -> Iterator[Model]:
    """Stable Diffusion's UNet, cut to two of its four widths."""
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    unet = FlaxUNet2DConditionModel(
        sample_size=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(320, 640),
        layers_per_block=1,
        cross_attention_dim=768,
    )
    params = jax.eval_shape(unet.init_weights, jax.random.key(0))
    yield Model("diffusers-unet", params, UNET, ["diffusers", "flax", "jax"])


FAMILIES: dict[str, Callable[[], Iterator[Model]]] = {
    f.__name__: f
    for f in (example, tunix, maxtext, gemma, core, flax, haiku, equinox, hf, diffusers)
}

if __name__ == "__main__":
    for family in sys.argv[1:]:
        for model in FAMILIES[family]():
            write(model)
