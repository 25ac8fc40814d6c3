"""Mixed precision by measurement: which linears lose most, and a scheme that spares them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from flatquant.capture import BlockRunner, check_tokens, first_block_inputs
from flatquant.fit.block import forward_fit
from flatquant.fit.modules import BlockFit, FitContext
from flatquant.formats import INTEGER, OFF
from flatquant.methods import resolve
from flatquant.models import family_of
from flatquant.models.spec import FamilySpec, Group
from flatquant.overrides import Override
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme
from flatquant.surgery import block_names


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantizing the linears that share one input does to the model, alone.

    Attributes:
        block: index of the decoder block.
        linears: names relative to the block.
        parameters: of these linears.
        divergence: mean KL divergence of the logits from the unquantized model's, in nats.
    """

    block: int
    linears: tuple[str, ...]
    parameters: int
    divergence: float


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel,
    scheme: str | Scheme,
    tokens: Tensor,
    *,
    method: str | Recipe = "rtn",
    seed: int = 0,
) -> list[Sensitivity]:
    """Quantize one group of linears at a time and compare the logits; the model is unchanged.

    Weights are rounded to nearest and nothing is fitted. The blocks in front of the one in
    question are not run again, so the whole costs about as much as groups · blocks / 2 forward
    passes; the hidden states in front of every block are kept.

    Args:
        model: a Hugging Face causal LM of a known family.
        scheme: what to quantize the linears to; keys and values stay as they are.
        tokens: token ids int64 [samples, seqlen]; a few thousand are enough.
        method: the name of a method, or a recipe, for its transforms; they are not fitted.
        seed: of random transforms.

    Raises:
        ValueError: unknown family, method or scheme, or unusable tokens.
    """
    family = family_of(model.config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = check_tokens(tokens, vocabulary, "measure_sensitivity")
    alone = _without_cache(Scheme.parse(scheme))
    names = block_names(model, family)
    blocks = [model.get_submodule(name) for name in names]
    hidden, run = first_block_inputs(model, family, tokens, batch_size=1)
    inputs = [hidden.to(model.dtype)]
    for block in blocks:
        inputs.append(_through(run, [block], inputs[-1]))
    found = []
    for index, name in enumerate(names):
        block = copy.deepcopy(blocks[index]).to(hidden.dtype)
        for group in family.groups:
            context = _context(model, family, group, alone, method)
            if not context.plan.quantizes_group(name, group):
                continue
            fit = BlockFit(block, name, context, Generator().manual_seed(seed)).to(hidden.device)
            parts = [
                forward_fit(block, fit, run, part.to(hidden.dtype), family.attention)
                for part in inputs[index].split(1)
            ]
            last = _through(run, blocks[index + 1 :], torch.cat(parts).to(model.dtype))
            found.append(
                Sensitivity(
                    block=index,
                    linears=group.linears,
                    parameters=sum(
                        block.get_parameter(f"{linear}.weight").numel() for linear in group.linears
                    ),
                    divergence=_divergence(model, family, last, inputs[-1]),
                )
            )
    return found


def mixed_precision(
    scheme: str | Scheme,
    measured: Sequence[Sensitivity],
    numbers: str = "8",
    *,
    share: float = 0.1,
) -> Scheme:
    """The scheme with other numbers for the linears that lose most per parameter.

    Args:
        scheme: what all others get.
        measured: by `measure_sensitivity`.
        numbers: for the linears that are spared: "8", "W8A8", "16", "E4M3", ...
        share: of all measured parameters, at most so many are spared.

    Raises:
        ValueError: a share outside 0..1, or numbers that a scheme refuses.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"mixed_precision: share={share} must lie in [0, 1]")
    left = share * sum(unit.parameters for unit in measured)
    spared: dict[str, list[int]] = {}
    for unit in sorted(measured, key=lambda unit: -unit.divergence / unit.parameters):
        if unit.parameters > left:
            continue
        left -= unit.parameters
        for linear in unit.linears:
            spared.setdefault(linear, []).append(unit.block)
    overrides = tuple(
        Override(pattern=linear, blocks=tuple(sorted(blocks)), numbers=numbers)
        for linear, blocks in spared.items()
    )
    base = Scheme.parse(scheme)
    return replace(base, overrides=(*base.overrides, *overrides))


def _without_cache(scheme: Scheme) -> Scheme:
    formats = {f"{part}_format": INTEGER for part in "kv"}
    return replace(scheme, k_bits=OFF, v_bits=OFF, kv_group=None, **formats)  # type: ignore[arg-type]


def _context(
    model: PreTrainedModel, family: FamilySpec, group: Group, scheme: Scheme, method: str | Recipe
) -> FitContext:
    """All but one group at full precision."""
    others = tuple(
        Override(pattern=linear, numbers=str(OFF))
        for other in family.groups
        for linear in other.linears
        if linear not in group.linears
    )
    recipe = resolve(method, replace(scheme, overrides=(*scheme.overrides, *others)))
    plan = QuantizationPlan(scheme=recipe.scheme, sites=frozenset(recipe.transforms))
    return FitContext(
        recipe=recipe,
        plan=plan,
        family=family,
        geometry=family.geometry(model.config),
        amp=False,
    )


def _through(run: BlockRunner, blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Hidden states behind some blocks, one sample at a time."""
    parts = []
    for part in hidden.split(1):
        for block in blocks:
            part = run(block, part)
        parts.append(part)
    return torch.cat(parts)


def _log_probabilities(model: PreTrainedModel, family: FamilySpec, hidden: Tensor) -> Tensor:
    """Of hidden states behind the last block, float32 [samples, tokens, vocabulary]."""
    norm = model.get_submodule(family.decoder).get_submodule("norm")
    logits: Tensor = model.get_output_embeddings()(norm(hidden))
    return log_softmax(logits.float(), dim=-1)


def _divergence(
    model: PreTrainedModel, family: FamilySpec, hidden: Tensor, reference: Tensor
) -> float:
    """Mean KL over all tokens, of the predictions from `reference`, the exact hidden states."""
    total = 0.0
    for part, exact in zip(hidden.split(1), reference.split(1), strict=True):
        found = _log_probabilities(model, family, part)
        wanted = _log_probabilities(model, family, exact)
        total += float(kl_div(found, wanted, log_target=True, reduction="sum"))
    return total / reference[..., 0].numel()
