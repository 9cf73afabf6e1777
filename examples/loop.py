"""The loop over steps that every run shares: look at the loss, validate, save, stop when asked."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from examples import checkpoints, processes, runs, training
from examples.errors import UserError


class Plan(NamedTuple):
    """How many steps a run takes, and when it looks at the loss, validates and saves."""

    steps: int
    stop: int  # The step that it stops after, with a checkpoint to resume from.
    amount: tuple[str, int]  # What a step sees, and how many of it.
    log_every: int
    eval_every: int
    save_every: int
    skip_nonfinite: int
    title: str  # Of the picture of the loss.
    loss: str  # What the loss is, for its axis.
    speed: bool = False  # Whether the metrics have it too, which no other run repeats.


def take_steps(
    plan: Plan,
    state: training.State,
    one_step: Callable[[int, training.State], tuple[training.State, dict]],
    evaluate: Callable[[dict, bool], dict[str, float]],
    saver: checkpoints.Checkpoints,
    stop_asked: Callable[[], bool],
    tell: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[training.State, int]:
    """Takes the steps that are left, or those until somebody asks to stop.

    Each step that is taken is in the metrics, and those of a checkpoint before it is saved.

    Args:
      plan: of the run.
      state: the training state.
      one_step: from the number of steps done and the state to the next state and its metrics.
      evaluate: from parameters, and whether they are the last, to the figures of a validation.
      saver: of the run's checkpoints.
      stop_asked: whether to stop after the step.
      tell: whom else to tell what is new in the metrics.

    Returns:
      The state and the number of steps done; there is a checkpoint of them.
    """
    folder, (what, each) = saver.folder, plan.amount
    done, asked = int(state["step"]), stop_asked()
    stop, programs = max(done, plan.stop), set[frozenset[str]]()
    pending, timed, since = [], 0, time.perf_counter()
    with tqdm.tqdm(
        total=plan.steps,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        disable=not processes.is_first(),
    ) as bar:
        bar.set_postfix_str("compiling ...")
        while done < stop and not asked:
            state, metrics = one_step(done, state)
            done, timed = done + 1, timed + 1
            if (program := frozenset(metrics)) not in programs:
                # What it takes to compile is no part of the speed.
                jax.block_until_ready(metrics)
                programs.add(program)
                timed, since = 0, time.perf_counter()
                bar.set_postfix_str("")
            asked = stop_asked()
            # The metrics stay on the device until they are needed: reading them waits for the step.
            pending.append({"step": done, what: done * each} | metrics)
            last, eval_due = done == plan.steps, done % plan.eval_every == 0
            save_due = done % plan.save_every == 0 or done == stop or asked
            if not (last or eval_due or save_due or done % plan.log_every == 0):
                continue
            found = zip(pending, jax.device_get(pending), strict=True)
            rows = [
                training.logged({name: np.asarray(values[name]).item() for name in row})
                for row, values in found
            ]
            speed = timed * each / (time.perf_counter() - since)
            check_finite(plan, rows)
            if timed and plan.speed:
                rows[-1][f"{what}_per_second"] = round(speed, 1)
            if last or eval_due:
                rows[-1] |= evaluate(state["params"], last)
                asked = asked or stop_asked()  # As by what was seen there.
            runs.append_metrics(folder, rows)
            tell(rows)
            saver.seal_finished()
            if save_due or asked:
                saver.save(done, state)
                runs.plot_loss(folder, plan.title, plan.loss)
            bar.update(len(rows))
            bar.set_postfix(shown(rows[-1]) | ({f"{what}/s": f"{speed:,.0f}"} if timed else {}))
            pending, timed, since = [], 0, time.perf_counter()
    return state, done


def check_finite(plan: Plan, rows: list[dict[str, Any]]) -> None:
    """Stops a run whose loss is not finite, or has not been in too many steps in a row."""
    loss, step = rows[-1]["loss"], rows[-1]["step"]
    if not plan.skip_nonfinite:
        if not math.isfinite(loss):
            raise UserError(f"The loss is {loss} at step {step}. Lower --learning-rate.")
        return
    for row in rows:
        if row["skipped_in_a_row"] >= plan.skip_nonfinite:
            raise UserError(
                f"--skip-nonfinite {plan.skip_nonfinite}: {row['skipped_in_a_row']} steps in a"
                f" row had no finite loss and gradient, to step {row['step']} with its loss of"
                f" {row['loss']}. Lower --learning-rate, or look at the data."
            )


def shown(row: dict[str, Any]) -> dict[str, str]:
    """What the progress bar says of a step."""
    parts = {"loss": f"{row['loss']:.3f}"}
    if "val_perplexity" in row:
        parts["val ppl"] = f"{row['val_perplexity']:.2f}"
    if row.get("skipped"):
        parts["skipped"] = str(row["skipped"])
    return parts
