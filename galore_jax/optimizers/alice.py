"""Alice: Adam in a subspace that is partly exchanged, and the rest of the gradient, whitened.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension", https://arxiv.org/abs/2502.07752. Written from the paper's equations, and
checked against code of another author.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.inner.residual import limit_norm_growth
from galore_jax.matrix.plan import check_rank, rank_of
from galore_jax.meshes import auto_mesh
from galore_jax.optimizers.matrices import beside_adam, over_matrices
from galore_jax.optimizers.wrap import in_float32
from galore_jax.projector.basis import align_signs, dot
from galore_jax.projector.project import contract
from galore_jax.projector.shares import each_its_share
from galore_jax.settings import Settings, check_gap

_TINY = 1e-30  # mean squares below it count as none


class ScaleByAliceState(NamedTuple):
    """State of `scale_by_alice`: trees of arrays for matrices with sides k <= c."""

    count: jax.typing.ArrayLike  # shape=(), dtype=int32: updates so far
    basis: optax.Updates  # shape=batch + (k, r): U
    gram: optax.Updates  # shape=batch + (r, r): mean of the squares of low-rank gradients
    mu: optax.Updates  # shape=batch + (r, c)
    nu: optax.Updates  # shape=batch + (r, c)
    outside: optax.Updates  # shape=batch + (c,): mean squares of what U does not show
    limit: optax.OptState  # the norm of the last compensation


def scale_by_alice(
    rank: int | float,
    update_proj_gap: jax.typing.ArrayLike = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.9,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    leading: float = 0.3,
    compensation: jax.typing.ArrayLike = 0.4,
    gamma: jax.typing.ArrayLike = 1.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's step in a subspace U, and a compensation for what lies outside of it.

    For a matrix G (k, c), k the smaller side,

    .. math::
        \sigma &= U^T G, \quad
        Q \leftarrow \beta_3 Q + (1 - \beta_3)\, \sigma \sigma^T, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1)\, \sigma, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, \sigma^2 \\
        p &\leftarrow \beta_1 p + (1 - \beta_1)\, 1^T (G - U \sigma)^2, \quad
        C = \sqrt{k - r}\; (G - U \sigma)\, \mathrm{diag}(p)^{-1/2} \\
        \mathrm{out} &= U\, m / (\sqrt v + \epsilon) + \alpha_c\, C

    where the norm of C grows by no more than gamma from step to step. Every T steps U is exchanged
    in part: the eigenvectors of :math:`\beta_3 U Q U^T + (1 - \beta_3)\, G G^T` are approached by a
    step of subspace iteration from U, the leading ones stay, and the others make room for
    directions that are drawn from the complement of all of them. The averages are not corrected
    for their beginning at zero, nor carried over to a new U, as in the paper.

    Args:
        rank: r, an int or a share of the smaller side.
        update_proj_gap: T.
        b1: decay rate of m and p.
        b2: decay rate of v.
        b3: decay rate of Q; 0 looks at the present gradient alone (Alice-0).
        eps: added to the root of v.
        leading: the share of U's directions that are leading ones, from 0 to 1, which draws none.
        compensation: :math:`\alpha_c`.
        gamma: largest growth of the norm of C in a step.

    Returns:
        An `optax.GradientTransformationExtraArgs` over matrices `batch + (m, n)`; its state is a
        `ScaleByAliceState`.

    Raises:
        TypeError: for a rank that is a function or no number; a gap that is no whole number.
        ValueError: for a rank, gap or share out of range.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> state = galore_jax.scale_by_alice(rank=2).init({"kernel": jnp.ones((8, 18))})
        >>> [x.shape for x in (state.basis["kernel"], state.nu["kernel"], state.gram["kernel"])]
        [(8, 2), (2, 18), (2, 2)]

    References:
        Gong et al., `Alice <https://arxiv.org/abs/2502.07752>`_, 2025
    """
    _check(rank, leading)
    check_gap(update_proj_gap)
    limit = limit_norm_growth(gamma)

    def shape_of(x):
        k, c = sorted(x.shape[-2:])
        return x.shape[:-2], k, c, min(k, rank_of(rank, "", x.shape, k))

    def init_fn(params):
        def zeros(shape_fn):
            def make(x):
                batch, k, c, r = shape_of(x)
                return jnp.zeros(batch + shape_fn(k, c, r), x.dtype)

            return jax.tree.map(make, params)

        return ScaleByAliceState(
            jnp.zeros([], jnp.int32),
            basis=zeros(lambda k, c, r: (k, r)),
            gram=zeros(lambda k, c, r: (r, r)),
            mu=zeros(lambda k, c, r: (r, c)),
            nu=zeros(lambda k, c, r: (r, c)),
            outside=zeros(lambda k, c, r: (c,)),
            limit=limit.init(params),
        )

    def update_fn(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        wide = [x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2) for x in leaves]
        grams, old = (treedef.flatten_up_to(x) for x in (state.gram, state.basis))
        count = jnp.asarray(state.count)

        def switched():
            rows = zip(wide, old, grams, strict=True)
            return [_switched(g, u, q, count, b3, leading) for g, u, q in rows]

        bases = jax.lax.cond(count % update_proj_gap == 0, switched, lambda: old)
        low = [contract(u, -2, g, -2) for u, g in zip(bases, wide, strict=True)]
        squares = [contract(x, -1, x, -1) for x in low]
        low_rank = treedef.unflatten(low)
        gram = optax.tree.update_moment(treedef.unflatten(squares), state.gram, b3, 1)
        mu = optax.tree.update_moment(low_rank, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(low_rank, state.nu, b2, 2)

        rests = [g - contract(u, -1, x, -2) for g, u, x in zip(wide, bases, low, strict=True)]
        columns = treedef.unflatten([jnp.sum(jnp.square(x), axis=-2) for x in rests])
        outside = optax.tree.update_moment(columns, state.outside, b1, 1)

        def whitened(rest, u, p):
            missing = (u.shape[-2] - u.shape[-1]) ** 0.5
            return missing * rest * jax.lax.rsqrt(jnp.maximum(p, _TINY))[..., None, :]

        white = map(whitened, rests, bases, treedef.flatten_up_to(outside))
        compensations, limited = limit.update(treedef.unflatten(white), state.limit)

        def step(x, u, m, v, c):
            out = contract(u, -1, m / (jnp.sqrt(v) + eps), -2) + compensation * c
            return out if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(out, -1, -2)

        basis = treedef.unflatten(bases)
        out = jax.tree.map(step, updates, basis, mu, nu, compensations)
        count = optax.safe_increment(count)
        return out, ScaleByAliceState(count, basis, gram, mu, nu, outside, limited)

    return in_float32(optax.GradientTransformation(init_fn, update_fn))


def _check(rank: Any, leading: Any) -> None:
    check_rank(rank)
    if callable(rank):
        raise TypeError(f"rank must be an int or a share here, got {rank!r}")
    if isinstance(leading, jax.Array):
        raise TypeError(
            "leading is a JAX array; it decides shapes, so it must be a Python number. Under "
            "optax.inject_hyperparams pass static_args=('rank', 'leading')"
        )
    if not 0 <= leading <= 1:
        raise ValueError(f"leading must be a share of the rank from 0 to 1, got {leading!r}")


def _switched(g, basis, gram, count, b3, leading: float) -> jax.Array:
    """New bases of matrices `batch + (k, c)`; on a mesh each device makes its share."""

    def one(item):
        g, basis, gram, count = item
        return _switch(g, basis, gram, count, b3, leading)

    rows = [x.reshape(-1, *x.shape[-2:]) for x in (g, basis, gram)]
    stack = (*rows, jnp.broadcast_to(count, rows[0].shape[:1]))
    work = partial(jax.lax.map, one)
    mesh = auto_mesh([g])
    new = work(stack) if mesh is None else each_its_share(mesh, work, stack)
    return new.reshape(basis.shape)


def _switch(g, basis, gram, count, b3, leading: float) -> jax.Array:
    """A new basis (k, r) of one matrix (k, c)."""
    k, r = basis.shape
    kept = round(leading * r)
    # The same draw for every matrix: it only has to be independent of the gradient, and layers
    # give the same together and one by one.
    sketch, draw = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
    start = jnp.where(jnp.any(basis), basis, jax.random.normal(sketch, basis.shape, basis.dtype))
    second = b3 * dot(basis, dot(gram, basis.T)) + (1 - b3) * dot(g, g.T)
    q = jnp.linalg.qr(dot(second, start))[0]
    vectors, _ = jax.lax.linalg.eigh(dot(q.T, dot(second, q)), symmetrize_input=True)
    found = dot(q, vectors[:, ::-1])
    complement = jnp.linalg.qr(found, mode="complete")[0][:, r:]
    if k - r < r - kept:  # too small a complement for all that are to be drawn
        complement = jnp.concatenate([complement, found[:, kept:]], axis=1)
    drawn = jax.random.permutation(draw, complement.shape[1])[: r - kept]
    new = jnp.concatenate([found[:, :kept], complement[:, drawn]], axis=1)
    return jnp.where(jnp.all(jnp.isfinite(new)), align_signs(new, basis), basis)


def alice(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.9,
    b3: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    rank: int | float,
    update_proj_gap: jax.typing.ArrayLike = Settings.update_proj_gap,
    leading: float = 0.3,
    compensation: jax.typing.ArrayLike = 0.4,
    scale: jax.typing.ArrayLike = 0.3,
    gamma: jax.typing.ArrayLike = 1.01,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    exclude: str | None = Settings.exclude,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Alice: Adam in a subspace that is tracked and exchanged in part, with compensation.

    With U the update of `scale_by_alice` on a matrix,

    .. math:: W \leftarrow W - \eta\,(\alpha\, U + \lambda W)

    Of a matrix with sides k <= c it keeps :math:`r (k + 2 c + r) + c` numbers and a norm. Leaves
    that are not projected take AdamW steps.

    Args:
        learning_rate: eta, a number or a schedule. Times alpha about AdamW's: 0.02 in the paper.
        b1: decay rate of the first moment and of the mean squares outside of the subspace.
        b2: decay rate of the second moment.
        b3: decay rate of what the subspace is tracked by; 0 for Alice-0.
        eps: added to the root of the second moment.
        weight_decay: lambda, decoupled, of all leaves.
        mask: tree of bools, or callable giving one: which leaves decay.
        rank: r, an int or a share of a matrix's smaller side.
        update_proj_gap: T, steps from one exchange to the next.
        leading: the share of the directions that are the leading ones; the paper's are 40 of 128
            and of 256.
        compensation: weight of what lies outside of the subspace.
        scale: alpha, on matrices alone.
        gamma: largest growth of the compensation's norm in a step.
        adam_learning_rate: of the leaves that are not projected, by default `learning_rate`, which
            is too large for most: try AdamW's.
        adam_b1: decay rate of their first moment.
        adam_b2: decay rate of their second moment.
        exclude: see `galore`.
        weight_dimension_numbers: see `galore`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that needs full gradients.

    Raises:
        TypeError: as `scale_by_alice`.
        ValueError: as `scale_by_alice`; as `galore` for `exclude` and `weight_dimension_numbers`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.alice(0.02, rank=2)
        >>> state = tx.init({"kernel": jnp.ones((8, 16))}).inner_states["alice"]
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * (8 + 2 * 16 + 2) + 16 + 1 + 1
        True

    References:
        Gong et al., `Alice <https://arxiv.org/abs/2502.07752>`_, 2025
    """
    _check(rank, leading)
    settings = Settings(
        rank=rank, exclude=exclude, weight_dimension_numbers=weight_dimension_numbers
    )
    matrices = optax.chain(
        scale_by_alice(
            rank, update_proj_gap, b1, b2, b3, eps,
            leading=leading, compensation=compensation, gamma=gamma,
        ),
        optax.scale(scale),
    )  # fmt: skip
    return beside_adam(
        over_matrices(matrices, settings),
        settings,
        learning_rate,
        adam_learning_rate,
        in_float32(optax.scale_by_adam(adam_b1, adam_b2, eps)),
        weight_decay,
        mask,
        "alice",
    )
