"""The rows of each table, from its JSON: one function a table, the head first."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

NOT_MEASURED = "not measured"
GIB = 2**30

Rows = Iterable[Sequence[str]]  # the head is the first
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Rows]]] = {}  # by name: JSONs, and rows


def of(*files: str, name: str | None = None) -> Callable:
    """Of which JSONs a function makes the table of its name, or of another."""

    def named(function: Callable[..., Rows]) -> Callable[..., Rows]:
        TABLES[name or function.__name__] = files, function
        return function

    return named


# --- How things are written ---


def number(x: Any, form: str = ".2f", unit: float = 1) -> str:
    """A number in units, or that there is none."""
    if not isinstance(x, int | float):
        return NOT_MEASURED
    return format(x / unit, form) if math.isfinite(x) else "diverged"


def percent(x: Any, form: str) -> str:
    """A share, in percent."""
    shown = number(x, form, 0.01)
    return shown if shown == NOT_MEASURED else f"{shown} %"


def gib(x: Any) -> str:
    """Three digits, from one GiB on."""
    return number(x, ".1f" if isinstance(x, int | float) and x >= 9.995 else ".2f")


def cells(row: dict, keys: Iterable[str], form: str = ".2f", unit: float = 1) -> list[str]:
    return [number(row.get(key), form, unit) for key in keys]


def title(name: str, titles: dict[str, str]) -> str:
    """A row's name for a reader; one without a title has its own."""
    return titles.get(name, name)


def ordered(found: dict[str, Any], titles: dict[str, str]) -> list[tuple[str, Any]]:
    """Rows as the titles are, then those without one."""
    rest = [name for name in found if name not in titles]
    return [(title(n, titles), found[n]) for n in (*titles, *rest) if n in found]


INT8 = '`accumulator_dtype="int8"`'

# --- One function a table ---


@of("checkpoint")
def checkpoint(found):
    titles = {
        "adamw": "AdamW",
        "muon": "`optax.contrib.muon`",
        "galore_adamw": "`galore_adamw`",
        "galore_adamw8bit, layer by layer": "`galore_adamw8bit`, layer by layer",
        "galore_muon": "`galore_muon`",
        "frugal": "FRUGAL",
    }
    yield "", "held-out loss", "rate", "state, MB", "compiled peak, MB"
    for name, row in ordered(found["optimizers"], titles):
        sizes = cells(row, ("state_mb", "peak_mb"), ",.0f")
        loss, rate = number(row.get("loss_after"), ".3f"), number(row.get("rate"), ".0e")
        yield name, loss, rate, *sizes


@of("finetune")
def finetune(found):
    titles = {
        "full": "full",
        "galore": "GaLore",
        "galore_muon": "`galore_muon`",
        "fira": "Fira",
        "lora": "LoRA",
    }
    yield "method", "rank", "accuracy, %", "weights, MB", "state, MB"
    for name, row in ordered(found["methods"], titles):
        seeds = list(row["seeds"].values())
        accuracies = [100 * seed["val_accuracy"] for seed in seeds]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(seeds) > 1 else ""
        rank = "" if name == "full" else "4"  # of every method in examples/finetune_config.py
        sizes = cells(seeds[0], ("weights_bytes", "state_bytes"), ".3f", 1e6)
        yield name, rank, f"{statistics.mean(accuracies):.2f}{spread}", *sizes


@of("tiers")
def tiers(found):
    titles = {
        "optax.adamw": "`optax.adamw`",
        "optax.contrib.galore, blocks stacked by the loss": "`optax.contrib.galore`, same scan",
        "optax.contrib.galore, blocks in a list": "`optax.contrib.galore`, blocks in a list",
        "tier 1": "galore_jax, full gradients",
        "tier 2": "**galore_jax, in the subspace**",
        "tier 3": "galore_jax, layer by layer (recomputes blocks)",
    }
    yield "", "plain step", "refresh step", "amortised", "over AdamW"
    amortised = found["amortised_seconds"]
    for name, seconds in found["seconds"].items():
        if name not in titles:
            continue
        adamw = name == "optax.adamw"
        ratio = "1" if adamw else number(amortised[name] / amortised["optax.adamw"])
        yield (
            titles[name],
            number(seconds["plain"]),
            "-" if adamw else number(seconds["refresh"]),
            number(amortised[name]),
            f"**{ratio}**" if titles[name].startswith("**") else ratio,
        )


@of("peers")
def optimizer_step(found):
    titles = {
        "optax.adamw": "`optax.adamw`",
        "optax.contrib.muon": "`optax.contrib.muon`",
        "flashoptim_jax.flash_adamw": "`flashoptim_jax.flash_adamw` (8-bit)",
        "rollfast.adamw8": "`rollfast.adamw8` (8-bit)",
        "galore_jax.adamw8bit": "`galore_jax.adamw8bit`",
        "optax.contrib.galore": "`optax.contrib.galore`",
        "rollfast galore_adamw": "`rollfast.optim.galore.galore_adamw`",
        "galore-torch": "`galore_torch.GaLoreAdamW`",
        "galore_jax.galore_adamw": "`galore_jax.galore_adamw`",
        "galore_jax.galore_adamw8bit": "`galore_jax.galore_adamw8bit`",
        "galore_jax.galore_muon, int8": f"`galore_jax.galore_muon`, {INT8}",
    }
    parts = [found.get(f"{part}_seconds", {}) for part in ("plain", "refresh", "whole")]
    failed = found.get("failed", {})
    yield "over AdamW's", "update", "with a refresh", "a whole step", "state, MB"
    for name, shown in titles.items():
        if name in failed and name not in parts[0]:
            yield shown, failed[name], "", "", ""
            continue
        plain, refresh, whole = (part.get(name) for part in parts)
        over = found["plain_seconds"]["optax.adamw"]
        refreshes = "galore" in name and name != "galore_jax.adamw8bit"
        yield (
            shown,
            number(plain, ".3g", over),
            number(refresh, ".3g", over) if refreshes else "-",
            number(whole, ".2f", parts[2].get("optax.adamw", 1)),
            number(found.get("state_bytes", {}).get(name), ".1f", 1e6),
        )


@of("nvidia_h200")
def gpu(found):
    titles = {
        "optax.adamw": "`optax.adamw`",
        "optax.contrib.galore": "`optax.contrib.galore`, blocks in a list",
        "tier 1": "galore_jax, full gradients",
        "tier 2": "galore_jax, in the subspace",
        "tier 3": "galore_jax, layer by layer",
    }
    models = ("350m", "1b")
    yield ("", *(x for m in models for x in (f"{m}: step, ms", "refresh, s", "peak, GB")))
    for name, shown in titles.items():
        line = [shown]
        for model in models:
            row = found["models"].get(model, {}).get(name, {})
            refreshes = name != "optax.adamw"
            peak = row.get("peak_bytes_refresh" if refreshes else "peak_bytes")
            # A row that did not end is of a run under other flags: nothing of it is comparable.
            if NOT_MEASURED in (peak, row.get("plain_seconds", NOT_MEASURED)):
                line += [NOT_MEASURED, "", ""]
                continue
            refresh = number(row.get("refresh_seconds"), ".1f") if refreshes else "-"
            line += [number(row["plain_seconds"], ".0f", 1e-3), refresh, number(peak, ".1f", 1e9)]
        yield line


@of("memory_rtx4090")
def recipes(found):
    told = {
        "24gb": (
            "`galore_adamw8bit`, r = 1024, int8 projectors",
            "bfloat16",
            "clipping, and batches above what fits",
        ),
        "16gb": ("`galore_muon`, int8 momentum, r = 256", "bfloat16", "and rank"),
        "12gb": ("`galore_muon`, int8 momentum, r = 512", "int8", "and half of the weights' bits"),
    }
    lengths = ("1 x 256", "1 x 2048")
    yield "`--recipe`", "optimizer", "weights", "state", *lengths, "what it gives up"
    for card, (optimizer, dtype, given_up) in told.items():
        rows = [found["models"]["7b"].get(f"{card}, {n.replace(' ', '')}", {}) for n in lengths]
        totals = [number(row.get("total")) for row in rows]
        weights, state = cells(rows[0], ("params", "opt_state"))
        yield f"`{card}`", optimizer, f"{weights}, {dtype}", state, *totals, given_up


@of("memory_rtx4090")
def checkpoints(found):
    cards = ("24gb", "16gb", "12gb")
    yield "", *(f"`{card}`" for card in cards)
    for name, row in found["models"].items():
        title, form = ("LLaMA-7B", "{}, 1x256") if name == "7b" else (name, "{}")
        totals = (row.get(form.format(card), {}).get("total") for card in cards)
        yield title, *(number(x, ".1f") for x in totals)


@of("memory")
def memory(found):
    titles = {
        "adamw": ("plain", "AdamW, full gradients"),
        "tier 1": ("with refresh", "GaLore, full gradients"),
        "tier 2": ("plain", "GaLore, in the subspace"),
        "tier 3": ("plain", "GaLore, layer by layer"),
        "tier 3, 8-bit, int8": ("plain", "layer by layer, 8-bit moments, int8 projectors"),
    }
    models = ("350m", "1b", "7b")
    yield "", *models
    for name, (program, shown) in titles.items():
        steps = [found["models"].get(m, {}).get("steps", {}).get(name, {}) for m in models]
        yield shown, *(number(step.get(program, {}).get("total")) for step in steps)


@of("state")
def state(found):
    yield "model", "rank", "weights", "AdamW", "GaLore", "GaLore, bfloat16 projectors"
    keys = ("weights", "adamw", "galore", "galore, bfloat16 projectors")
    for name, row in found["models"].items():
        yield name, str(row["rank"]), *(gib(row.get(key)) for key in keys)


QUALITY = {
    "8-bit Muon": "**`muon8bit`**",
    "Muon": "`optax.contrib.muon`",
    "galore_muon": "`galore_muon`, T = 200",
    "galore_muon, int8": f"**`galore_muon`, {INT8}**, T = 200 (its default)",
    "galore_muon, int8, rank 0.5": f"**`galore_muon`, {INT8}, r = 64**, T = 200",
    "galore_muon, int8, rank 8": f"`galore_muon`, {INT8}, r = 8, T = 200",
    "galore_muon, random directions": '`galore_muon`, `method="random"`, T = 200',
    "galore_muon, GaLore's subspace": '`galore_muon`, `method="randomized"`, T = 200',
    "FRUGAL": "**FRUGAL**, T = 50",
    "LDAdam": "`ldadam`",
    "AdamW": "`optax.adamw`",
    "APOLLO": "`apollo`, T = 50",
    "APOLLO-Mini": "`apollo_mini`, T = 50",
    "Alice": "`alice`, T = 200",
    "FOAM-2": "`foam`",
    "RACS": "`racs`",
    "Fira": "`fira`, T = 50",
    "GaLore": "`galore_adamw`, T = 50",
    "GaLore, T = 200": "`galore_adamw`, T = 200",
    "GaLore, lazy refresh": '`galore_adamw`, `refresh="lazy"`, T = 50',
    "GaLore, rotated moments": '`galore_adamw`, `moments="rotate"`, T = 50',
    "GoLore": "GoLore, T = 50",
    "optax.contrib.galore": "`optax.contrib.galore`, T = 50",
    "SCALE": "`scale_sgd`",
    "ReLoRA": "ReLoRA, T = 50",
    "low rank": "low-rank weights",
    "low rank, refactored": "low-rank weights, refactored",
}


def _by_loss(methods: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(methods.items(), key=lambda item: item[1]["loss"])


@of("quality")
def quality(found):
    yield "", "perplexity", "range", "way", "state, MB", "over AdamW's", "tokens/s"
    for name, row in _by_loss(found["methods"]):
        verdict = found["verdicts"].get(name, {})
        speed = row.get("speed")
        yield (
            title(name, QUALITY),
            *cells(row, ("perplexity", "perplexity_spread")),
            percent(verdict.get("way_from_adamw_to_muon"), ".0f"),
            number(row["state_of_kernels"], unit=1e6),
            number(verdict.get("state_over_adamw")),
            number(speed and 100 * round(speed / 100), ",.0f"),
        )


@of("quality_man")
@of("quality_batch4", name="quality_batch4")
@of("quality_large", name="quality_large")
def quality_man(found):
    titles = {name: re.sub(", T = .*", "", shown) for name, shown in QUALITY.items()}
    titles |= {"galore_muon, int8, rank 0.5": f"**`galore_muon`, {INT8}, `rank=0.5`**"}
    yield "", "loss by seed", "perplexity", "state, MB"
    for name, row in _by_loss(found["methods"]):
        losses = ", ".join(number(x, ".3f") for x in row["losses"])
        state = number(row["state_of_kernels"], unit=1e6)
        yield title(name, titles), losses, number(row["perplexity"]), state


@of("quality_batch16", name="quality_batch16")
def quality_tuned(found):
    """The same, where each has a rate of its own: of how many."""
    rates = [
        f"{row['learning_rate']:g} of {len(row['tuning_losses'])}"
        for _, row in _by_loss(found["methods"])
    ]
    for row, rate in zip(quality_man(found), ("rate", *rates), strict=True):
        yield *row, rate


@of("muon")
def muon(found):
    titles = {
        "optax.adamw": "`optax.adamw`",
        "optax.contrib.muon": "`optax.contrib.muon`",
        "muon8bit": "`muon8bit`",
        "galore_muon": "`galore_muon`",
        "galore_muon, int8": f"`galore_muon`, {INT8}",
        "alice": "`alice`",
        "foam": "`foam`",
        "racs": "`racs`",
        "galore_adamw": "`galore_adamw`",
        "frugal": "FRUGAL",
    }
    parts = found["rows"]
    yield "over AdamW's", *("update alone" if p == "optimizer" else f"step of {p}" for p in parts)
    for name in (name for name in titles if any(name in part for part in parts.values())):
        ratios = [part.get(name, {}).get("over_adamw") for part in parts.values()]
        yield titles[name], *("1" if x == 1 else number(x, ".3g") for x in ratios)


@of("quality", "quality_man", "muon")
def glance(first, second, steps):
    """The best of each kind, in all that tells."""
    shown = {
        "`optax.adamw`": ("AdamW", "optax.adamw"),
        "`optax.contrib.muon`": ("Muon", "optax.contrib.muon"),
        "`muon8bit`": ("8-bit Muon", "muon8bit"),
        "**`galore_muon`**, 8 bits": ("galore_muon, int8, rank 0.5", "galore_muon, int8"),
        "**FRUGAL**": ("FRUGAL", "frugal"),
        "`racs`": ("RACS", "racs"),
        "GaLore": ("GaLore", "galore_adamw"),
    }
    lengths = ("512 tokens", "2048 tokens", "8192 tokens")
    yield "", "perplexity", "on another text", "state, MB", *(f"step of {n}" for n in lengths)
    for title, (method, optimizer) in shown.items():
        row = first["methods"][method]
        other = second["methods"].get(method, {})
        ratios = [steps["rows"].get(n, {}).get(optimizer, {}).get("over_adamw") for n in lengths]
        yield (
            title,
            *(number(x.get("perplexity")) for x in (row, other)),
            number(row["state_of_kernels"], unit=1e6),
            *(number(x) for x in ratios),
        )


@of("layouts")
def layouts(found):
    titles = {
        "default": "the default",
        "last_two_axes": "`galore_jax.last_two_axes`",
        "matrix_axes": "`galore_jax.matrix_axes`",
    }
    models = found["models"].values()
    head = f"of {len(models)} models, those with 99 % of their linear maps found"
    yield "`weight_dimension_numbers`", head, "state over AdamW's, median"
    for name, shown in titles.items():
        enough = sum(round(model[name]["right"], 2) >= 0.99 for model in models)
        yield shown, str(enough), number(statistics.median(m[name]["state"] for m in models))


@of("precision")
def precision(found):
    yield "", "final loss against float32"
    for name in found["final_losses"]:
        if name != "float32":
            yield name, percent(found["relative_to_float32"].get(name), "+.2f")


@of("devices")
def devices(found):
    titles = {
        "adamw": "`optax.adamw`",
        "muon": "`optax.contrib.muon`",
        "galore_adamw": "`galore_adamw`",
        "galore_adamw8bit": "`galore_adamw8bit`",
        "galore_muon": "`galore_muon`",
    }
    yield "GiB", "state", "of it a device", "received in a plain step", "with a refresh"
    for name, row in ordered(found["optimizers"], titles):
        plain, refresh = cells(row, ("plain_bytes", "refresh_bytes"), ".1f", GIB)
        same = row["plain_bytes"] == row["refresh_bytes"]
        held = number(row["state_bytes_per_device"], unit=GIB)
        yield name, number(row["state_bytes"], ".1f", GIB), held, plain, "" if same else refresh
