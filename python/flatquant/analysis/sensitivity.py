"""Which parts of a model mind few bits most: one part is quantized, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm.auto import tqdm

from flatquant.analysis.bases import residual_rotation
from flatquant.analysis.stream import Stream
from flatquant.models.spec import FamilySpec
from flatquant.plan import QuantizationPlan
from flatquant.sensitivity import measure_sensitivity

Line = tuple[int, str, int, float]
"""(layer, group, bits, KL in nats a token)."""


def sensitivities(
    fp: Any,
    quantized: Any,
    family: FamilySpec,
    tokens: Tensor,
    widths: tuple[int, ...],
    plan: QuantizationPlan,
    progress: bool = True,
) -> Iterator[Line]:
    """Every group of linears rounded to nearest at every width, and every block as it was made.

    Inputs are rounded with the weights if the plan's scheme quantizes inputs. The group "block" is
    the quantized model's whole block, under the bits of its scheme's weights.

    Args:
        fp: the floating-point model.
        quantized: the quantized one.
        family: of both.
        tokens: int64 [windows, tokens]; each window costs a run through the blocks that follow,
            and two heads, for every group and width.
        widths: bits to round to, 2..8.
        plan: the quantized model's.
        progress: show a bar.
    """
    inputs = plan.scheme.quantizes_activations
    sites = {group.linears: group.site.value for group in family.groups}
    for bits in tqdm(widths, desc="sensitivity", unit="width", disable=not progress, leave=False):
        scheme = f"W{bits}A{bits}" if inputs else f"W{bits}A16"
        for unit in measure_sensitivity(fp, scheme, tokens):
            yield unit.block, sites[unit.linears], bits, unit.divergence
    yield from _blocks(fp, quantized, family, tokens, plan.scheme.w_bits)


@torch.no_grad()
def _blocks(
    fp: Any, quantized: Any, family: FamilySpec, tokens: Tensor, bits: int
) -> Iterator[Line]:
    rotation = residual_rotation(fp, quantized)
    theirs, ours = (Stream(model, family, tokens, len(tokens)) for model in (fp, quantized))
    blocks, own = list(family.get_blocks(fp)), list(family.get_blocks(quantized))
    before = [theirs.hidden]
    for block in blocks:
        before.append(theirs.through(block, before[-1]))
    expected = _predictions(theirs, before[-1])
    for layer, hidden in enumerate(before[:-1]):
        fed = hidden if rotation is None else hidden @ rotation
        changed = ours.through(own[layer], fed)
        changed = changed if rotation is None else changed @ rotation.mT
        for block in blocks[layer + 1 :]:
            changed = theirs.through(block, changed)
        found = _predictions(theirs, changed)
        total = float(kl_div(found, expected, log_target=True, reduction="sum"))
        yield layer, "block", bits, total / tokens.numel()


def _predictions(stream: Stream, hidden: Tensor) -> Tensor:
    """Log-probabilities [windows, tokens, vocabulary] for hidden states behind the last block."""
    any_tokens = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
    stream.hidden = hidden
    with stream.finished() as model:
        parts = [model(input_ids=any_tokens, use_cache=False).logits.float() for _ in hidden]
    return log_softmax(torch.cat(parts), -1)
