"""GPTQ and LDLQ: two names, and two orders of the columns, for rounding with feedback."""

from __future__ import annotations

from dataclasses import dataclass

from flatquant.weights.feedback import Feedback


@dataclass(frozen=True, kw_only=True)
class Gptq(Feedback):
    """GPTQ (arXiv 2210.17323): what one column loses is made up for by those to come.

    Block and damping are the paper's (its steps 2 and 3); act-order and static groups are
    options of its code, and the defaults here.
    """

    act_order: bool = True


@dataclass(frozen=True, kw_only=True)
class Ldlq(Feedback):
    """QuIP's rounding (arXiv 2307.13304, section 3): columns as they come, fixed scales.

    Equal to GPTQ without act-order, as QuIP proves. `act_order` and `passes` (of the paper's
    greedy updates) make it LDLQ-RG.
    """
