"""Ready optimizers: Optax's own, with moments in 8 bits, inside `galore`, or both.

Each takes the arguments of the Optax optimizer it is named after, with the same defaults,
and those of `galore` its options.
"""

from typing import Any, Unpack

import jax
import optax

from galore_jax.optimizers.eightbit import scale_by_adam8bit, scale_by_lion8bit
from galore_jax.optimizers.wrap import with_rate
from galore_jax.settings import GaLoreOptions, Settings, takes
from galore_jax.transform import galore


@takes(Settings)
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in the gradient's low-rank subspace, the paper's main optimizer.

    `galore(optax.adamw(...), rank=rank)`: with R the projected gradient,

    .. math::
        W \leftarrow W - \eta\,(\mathrm{scale}\; P\, \hat m(R) / (\sqrt{\hat v(R)} + \epsilon)
        + \lambda W)

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        mu_dtype: dtype of the first moment, float32 by default.
        weight_decay: lambda, decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        nesterov: use Nesterov momentum.
        **options: see `galore`, rank first of all.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, galore_jax
        >>> params = {"kernel": jnp.ones((8, 16))}
        >>> loss = lambda p: jnp.sum(jnp.square(p["kernel"]))
        >>> tx = galore_jax.galore_adamw(0.1, rank=1, scale=1.0)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss(params):.1f}")
        119.1
        110.5
        102.3

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    if nesterov and options.get("moments") == "reset":
        raise ValueError(
            "moments='reset' cannot correct the bias of nesterov=True; use 'rotate' or 'keep'"
        )
    inner = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    return galore(inner, **options)


@takes(Settings)
def galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in the subspace with moments in 8 bits: the paper's recipe for 7B in 24 GB.

    `galore(galore_jax.adamw8bit(...), rank=rank)`: the update of `galore_adamw`, with its moments
    stored in blocks as `galore_jax.scale_by_adam8bit` does. With `projector_dtype="int8"`
    the whole state of a matrix (m, n) takes about r (m + 2 n) bytes.

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        weight_decay: lambda, decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        **options: see `galore`, rank first of all.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `galore`, and for a leaf that is not of a real floating dtype.
        ValueError: as `galore`; 8-bit moments cannot be reset or rotated at a refresh.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.galore_adamw8bit(1e-3, rank=64, projector_dtype="int8")
        >>> state = tx.init({"kernel": jnp.ones((256, 512))})
        >>> state.inner_state[0].mu["kernel"].dtype, state.projector.codes["kernel"].dtype
        (dtype('uint8'), dtype('int8'))

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; Dettmers et al., `8-bit
        Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    inner = adamw8bit(learning_rate, b1, b2, eps, eps_root, weight_decay, mask)
    return galore(inner, **options)


@takes(Settings)
def galore_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Lion in the gradient's low-rank subspace.

    `galore(optax.lion(...), rank=rank)`: with R the projected gradient and m its momentum,
    the lifted step is :math:`-\eta\, \mathrm{scale}\; P\, \mathrm{sign}(b_1 m + (1-b_1) R)`.

    Args:
        learning_rate: a number or a schedule.
        b1: how the momentum and the gradient are mixed into the step.
        b2: decay rate of the momentum.
        mu_dtype: dtype of the momentum, float32 by default.
        weight_decay: decoupled, acting on the full weight.
        mask: tree of bools, or callable giving one: which leaves decay.
        **options: see `galore`, rank first of all.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.galore_lion(1e-4, rank=2)
        >>> tx.init({"kernel": jnp.ones((8, 16))}).inner_state[0].mu["kernel"].shape
        (2, 16)

    References:
        Chen et al., `Lion <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    inner = optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
    return galore(inner, **options)


@takes(Settings)
def galore_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum in the gradient's low-rank subspace.

    `galore(optax.sgd(...), rank=rank)`: the lifted step is
    :math:`-\eta\, \mathrm{scale}\; P\, m`, :math:`m \leftarrow \mu m + R`.

    Args:
        learning_rate: a number or a schedule.
        momentum: mu; None for plain SGD, which keeps no state but the projector.
        nesterov: use Nesterov momentum.
        accumulator_dtype: dtype of the momentum, float32 by default.
        **options: see `galore`, rank first of all.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `galore`.
        ValueError: as `galore`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.galore_sgd(0.1, momentum=0.9, rank=2)
        >>> tx.init({"kernel": jnp.ones((8, 16))}).inner_state[0].trace["kernel"].shape
        (2, 16)

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    inner = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return galore(inner, **options)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with moments in 8 bits: two bytes and a 32nd of state a weight, instead of eight.

    With u from `scale_by_adam8bit`, :math:`W \leftarrow W - \eta\,(u + \lambda W)`. Defaults are
    those of `optax.adamw`.

    Args:
        learning_rate: eta, a number or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        weight_decay: lambda, decoupled.
        mask: tree of bools, or callable giving one: which leaves decay.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `scale_by_adam8bit`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_jax import adamw8bit
        >>> params = jnp.ones((64, 64))
        >>> loss = lambda p: jnp.mean(jnp.square(p))
        >>> tx = adamw8bit(0.1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss(params):.2f}")
        0.81
        0.64
        0.49

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    return with_rate(scale_by_adam8bit(b1, b2, eps, eps_root), learning_rate, weight_decay, mask)


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with its momentum in 8 bits: one byte and a 64th of state a weight.

    With u from `scale_by_lion8bit`, :math:`W \leftarrow W - \eta\,(u + \lambda W)`. Defaults are
    those of `optax.lion`.

    Args:
        learning_rate: eta, a number or a schedule.
        b1: how the momentum and the gradient are mixed into the step.
        b2: decay rate of the momentum.
        weight_decay: lambda, decoupled.
        mask: tree of bools, or callable giving one: which leaves decay.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        TypeError: as `scale_by_adam8bit`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_jax import lion8bit
        >>> params = jnp.ones((64, 64))
        >>> loss = lambda p: jnp.mean(jnp.square(p))
        >>> tx = lion8bit(0.1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss(params):.2f}")
        0.81
        0.64
        0.49

    References:
        Chen et al., `Lion <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    return with_rate(scale_by_lion8bit(b1, b2), learning_rate, weight_decay, mask)
