"""`--skip-nonfinite`: steps whose loss or gradient is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from examples import optimizers, training, watching
from tests.examples.bigram import Bigram, run
from tests.small_run import metrics


class Model:
    """Kernels in a row. The loss of a batch that begins with 7 is NaN, the gradient with 8."""

    def __init__(self, params):
        self.params = params

    def losses(self, tokens, targets, watch=None):
        blocks, first = self.params["blocks"], tokens[0, 0]

        def block(kernel, x):
            return x + jnp.tanh(x @ kernel)

        x = self.params["embed"][tokens]
        if watch is None:
            x = galore_jax.layerwise(block, blocks["kernel"], x)
        else:
            both = blocks["kernel"], watch
            x = galore_jax.layerwise(lambda p, x: block(watching.watched(*p), x), both, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ self.params["head"], targets)
        # Where the root is of zero its slope is infinite, and that times zero NaN.
        losses = losses + jnp.sqrt(jnp.where(first == 8, 0.0, 1.0) * losses)
        return jnp.where(first == 7, jnp.nan, losses)


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (20, 64), "blocks": (8, 64, 64), "head": (64, 20)}
    made = {
        n: 0.1 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return made | {"blocks": {"kernel": made["blocks"]}}


def batch(first):
    tokens = np.random.default_rng(first).integers(10, 20, (4, 17)).astype(np.int32)
    tokens[0, 0] = first
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "optimizer"),
    # In 8 bits moments of a gradient that is not finite begin anew, and nothing shows.
    [("full", "adamw"), ("subspace", "galore_adamw"), ("layerwise", "galore_adamw8bit")],
)
def test_a_skipped_step_changes_nothing(tier, optimizer):
    """Neither weights, nor the optimizer's state, nor when projectors have their turn."""
    clip = None if tier == "layerwise" else 0.5
    tx = optimizers.create(optimizer, 1e-2, rank=4, update_proj_gap=2, clip=clip)

    def compiled(skip):
        step = training.make_train_step(
            Model, tx, lambda done: 0.1 * done, tier=tier, clip=0.5, skip_nonfinite=skip
        )
        return step.lower(training.new_state(weights(), tx), batch(1)).compile()

    def after(step, *firsts):
        state, rows = training.new_state(weights(), tx), []
        for first in firsts:
            state, figures = step(state, batch(first))
            rows.append(jax.tree.map(float, figures))
        return state, rows

    step, plain = compiled(True), compiled(False)
    wanted, steady = after(step, 1, 2, 3)
    found, rows = after(step, 7, 1, 2, 8, 7, 3)
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, found[part], wanted[part])
    assert (int(found["step"]), int(found["skipped"]), int(wanted["skipped"])) == (6, 3, 0)
    assert [row["skipped"] for row in rows] == [1, 1, 1, 2, 3, 3]
    assert [row["skipped_in_a_row"] for row in rows] == [1, 0, 0, 1, 2, 0]
    assert np.isfinite(rows[3]["loss"]) and not np.isfinite(rows[3]["grad_norm"])
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [rows[i][key] for i in (1, 2, 5)] == [row[key] for row in steady]
    # Where nothing is skipped it is what it would be without the flag.
    _, without = after(plain, 1, 2, 3)
    for key in without[0]:
        assert [row[key] for row in without] == pytest.approx([row[key] for row in steady])
    # And not everything is there twice.
    size = sum(x.nbytes for x in jax.tree.leaves(wanted))
    beside, usual = (x.memory_analysis().temp_size_in_bytes for x in (step, plain))
    assert beside < usual + 0.5 * size


class Sometimes(Bigram):
    """NaN for every fifth batch or so."""

    def losses(self, tokens, targets, watch=None):
        losses = super().losses(tokens, targets, watch)
        return jnp.where(jnp.sum(tokens) % 5 == 0, jnp.nan, losses)


class Never(Bigram):
    def losses(self, tokens, targets, watch=None):
        return jnp.nan * super().losses(tokens, targets, watch)


def test_skipped_steps_are_counted_and_shown(folder, capsys):
    flags = ["--steps", "16", "--save-every", "100", "--eval-every", "100"]
    assert run("--run-dir", "one", *flags, model=Sometimes) == 2
    assert "The loss is nan at step" in capsys.readouterr().err
    assert run("--resume", "one", "--skip-nonfinite", "4", model=Sometimes) == 0
    skipped = [row["skipped"] for row in metrics("one") if "skipped" in row]
    lost = [row["step"] for row in metrics("one") if not np.isfinite(row["loss"])]
    assert skipped[-1] == len(lost) > 0
    assert [row["step"] for row in metrics("one")] == list(range(1, 17))
    assert f"skipped={len(lost)}" in capsys.readouterr().err


def test_too_many_in_a_row_stop_the_run(folder, capsys):
    assert run("--run-dir", "one", "--skip-nonfinite", "3", model=Never) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert "--skip-nonfinite 3: 3 steps in a row" in line and "to step 3 " in line
    assert "Lower --learning-rate" in line
