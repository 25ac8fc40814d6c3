"""Methods side by side: name -> recipe for a scheme. A new one is a function and a line here.

Files hold what belongs together: `rounding` changes nothing but how numbers are rounded,
`scaling` moves ranges between inputs and weights, `rotations` mixes channels by orthogonal
matrices, `affine` learns changes of basis (FlatQuant), `outliers` keeps some channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flatquant.methods.affine import (
    flatquant,
    flatquant_direct,
    flatquant_early_clips,
    flatquant_fixed_clips,
    flatquant_gptq,
    flatquant_lt,
    flatquant_lt_lct,
    flatquant_lt_ps,
    flatquant_paper,
)
from flatquant.methods.learned import affinequant, awq_omniquant, norm_tweaking, omniquant, tesseraq
from flatquant.methods.outliers import llm_int8, owq, quik
from flatquant.methods.rotations import (
    hadamard,
    quarot,
    quarot_gptq,
    quip,
    random,
    spinquant,
    spinquant_gptq,
    spinquant_nohad,
)
from flatquant.methods.rounding import rtn
from flatquant.methods.scaling import awq, awq_asym, awq_gptq, os_plus, smoothquant
from flatquant.methods.sparse import magnitude, magnitude_2to4, wanda, wanda_2to4
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme

METHODS: dict[str, Callable[[Scheme], Recipe]] = {
    "rtn": rtn,
    "smoothquant": smoothquant,
    "os_plus": os_plus,
    "awq": awq,
    "awq-asym": awq_asym,
    "awq-gptq": awq_gptq,
    "magnitude": magnitude,
    "magnitude-2to4": magnitude_2to4,
    "wanda": wanda,
    "wanda-2to4": wanda_2to4,
    "llm_int8": llm_int8,
    "quik": quik,
    "owq": owq,
    "hadamard": hadamard,
    "random": random,
    "quarot": quarot,
    "quarot-gptq": quarot_gptq,
    "quip": quip,
    "spinquant": spinquant,
    "spinquant-gptq": spinquant_gptq,
    "spinquant-nohad": spinquant_nohad,
    "omniquant": omniquant,
    "affinequant": affinequant,
    "awq-omniquant": awq_omniquant,
    "norm_tweaking": norm_tweaking,
    "tesseraq": tesseraq,
    "flatquant": flatquant,
    "flatquant-paper": flatquant_paper,
    "flatquant-gptq": flatquant_gptq,
    "flatquant-direct": flatquant_direct,
    "flatquant-lt": flatquant_lt,
    "flatquant-lt-ps": flatquant_lt_ps,
    "flatquant-lt-lct": flatquant_lt_lct,
    "flatquant-fixed-clips": flatquant_fixed_clips,
    "flatquant-early-clips": flatquant_early_clips,
}
"""Name -> recipe for a scheme, with the settings of the method's paper."""


def resolve(method: str | Recipe, scheme: str | Scheme) -> Recipe:
    """The recipe of a name, or the recipe itself with its scheme replaced.

    Raises:
        ValueError: unknown name or bad scheme.
    """
    parsed = Scheme.parse(scheme)
    if isinstance(method, Recipe):
        return replace(method, scheme=parsed)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; known: {list(METHODS)}")
    return METHODS[method](parsed)
