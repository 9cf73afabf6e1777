"""The family's members, each by a function that makes it."""

import optax

import galore_jax

RATE = 1e-2


def galore_with(**fixed):
    def make(**options):
        return galore_jax.galore_adamw(RATE, weight_decay=0.1, **fixed, **options)

    return make


def frugal(**options):
    return galore_jax.galore(
        optax.adamw(RATE, weight_decay=0.1), residual=optax.sign_sgd(RATE), **options
    )


def without_gap(make):
    def made(update_proj_gap=None, **options):
        return make(RATE, weight_decay=0.1, **options)

    return made


def with_decay(make, **fixed):
    def made(**options):
        return make(RATE, weight_decay=0.1, **fixed, **options)

    return made


def mini(rank=None, **options):
    return galore_jax.apollo_mini(RATE, weight_decay=0.1, **options)


# Those that need no more than the projected gradient, and those that need all of it.
IN_SUBSPACE = {
    "lazy": galore_with(refresh="lazy"),
    "lazy, staggered, reset": galore_with(refresh="lazy", stagger=True, moments="reset"),
    "coordinates": galore_with(method="coordinates", moments="rotate"),
    "golore": galore_with(method={0: "svd", 6: "random"}),
}
FULL = {
    "frugal": frugal,
    "fira": with_decay(galore_jax.fira),
    "apollo": with_decay(galore_jax.apollo),
    "apollo, svd": with_decay(galore_jax.apollo, method="svd"),
    "apollo_mini": mini,
    "ldadam": without_gap(galore_jax.ldadam),
    "galore_muon": with_decay(galore_jax.galore_muon),
    "galore_muon, svd": with_decay(galore_jax.galore_muon, method="svd", refresh="lazy"),
}


def scale(**_):
    return galore_jax.scale_sgd(RATE, weight_decay=0.1, output_layer="head|^w")


def matrices(make):
    def made(weight_dimension_numbers=None, **_):
        return make(RATE, weight_decay=0.1, weight_dimension_numbers=weight_dimension_numbers)

    return made


def alice(rank=0.25, update_proj_gap=200, weight_dimension_numbers=None, **_):
    return galore_jax.alice(
        RATE, weight_decay=0.1, rank=rank, update_proj_gap=update_proj_gap,
        weight_dimension_numbers=weight_dimension_numbers,
    )  # fmt: skip


# Those without a projector of `galore`'s.
UNPROJECTED = {
    "scale": scale,
    "alice": alice,
    "foam": matrices(galore_jax.foam),
    "racs": matrices(galore_jax.racs),
}
MEMBERS = IN_SUBSPACE | FULL | UNPROJECTED
