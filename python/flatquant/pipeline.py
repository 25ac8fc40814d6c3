"""The whole story: text in, calibrated blocks out; then surgery."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flatquant.capture import (
    BlockRunner,
    InputStatistics,
    StatisticsCollector,
    check_tokens,
    first_block_inputs,
    watching,
)
from flatquant.checkpoint import attach
from flatquant.fit.block import FitLog, fit_block, forward_fit
from flatquant.fit.modules import BlockFit, FitContext
from flatquant.fit.precision import amp_pays
from flatquant.merge import HessianOf, merge_block
from flatquant.methods import resolve
from flatquant.models import Site, family_of
from flatquant.models.spec import check_weights
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.report import report
from flatquant.result import CalibrationResult
from flatquant.runtime.attention import register
from flatquant.runtime.cache import ATTENTION
from flatquant.scheme import Scheme
from flatquant.surgery import block_names
from flatquant.weights import HessianCollector, WeightQuantizer
from flatquant.work_dir import WorkDir, fingerprint

_log = logging.getLogger("flatquant")


def calibrate(
    model: PreTrainedModel,
    method: str | Recipe = "flatquant",
    scheme: str | Scheme = "W4A4KV4",
    calibration: Tensor | None = None,
    *,
    epochs: int | None = None,
    weights: str | WeightQuantizer | None = None,
    seed: int = 0,
    ignore: str | tuple[str, ...] = ("lm_head",),
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> CalibrationResult:
    """Fit a method to a model, block by block; the model itself is not changed.

    Every block is fitted to its own floating-point output on the floating-point output of the
    block before it (FlatQuant, section 3.2), merged in float64 and rounded. Memory beyond the
    model: one block in float32, and the hidden states of the calibration text twice.

    Args:
        model: a Hugging Face causal LM of a known family, on any device, any float dtype.
        method: name in `METHODS`, or a `Recipe`.
        scheme: what to quantize, e.g. "W4A4KV4".
        calibration: token ids int64 [samples, seqlen]; methods without data take None.
        epochs: overrides the recipe's.
        weights: overrides the recipe's weight quantizer: a name ("rtn", "gptq-mse", ...) or a
            value (`flatquant.weights.Gptq(...)`).
        seed: of transforms' start values.
        ignore: linears to leave alone, by full name, or "re:pattern".
        work_dir: folder that keeps every finished block.
        resume: continue from the blocks in `work_dir`; the result is bit-identical to an
            uninterrupted run on the same machine, thread count and library versions.
        progress: show a bar with the time left.

    Raises:
        ValueError: unknown family, method or scheme; unusable calibration text; weights that
            are not finite; a work_dir of another run.
        FitDivergedError: the fit produced NaN or met a singular matrix.
    """
    recipe = _overridden(resolve(method, scheme), epochs, weights)
    family = family_of(model.config)
    names = block_names(model, family)
    for name in names:
        check_weights(model.get_submodule(name), family, name)
    plan = QuantizationPlan(
        scheme=recipe.scheme,
        sites=frozenset(recipe.transforms),
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        method=recipe.method,
    )
    _check_ignored(model, plan)
    device = next(model.parameters()).device
    context = FitContext(
        recipe=recipe,
        plan=plan,
        family=family,
        geometry=family.geometry(model.config),
        amp=amp_pays(recipe.fit.amp, device),
    )
    wide = torch.promote_types(model.dtype, torch.float32)
    with _attention(model):
        run, hidden = None, None
        if recipe.needs_data:
            vocabulary = model.get_input_embeddings().weight.shape[0]
            tokens = check_tokens(calibration, vocabulary, f"method {recipe.method!r}")
            hidden, run = first_block_inputs(model, family, tokens, recipe.fit.batch_size)
        store = WorkDir(work_dir, resume, fingerprint(model, recipe, plan, seed, calibration))
        results: list[Mapping[str, Tensor]] = []
        log: list[Mapping[str, Any]] = []
        with _bar(len(names), recipe, progress) as bar:
            for index, name in enumerate(names):
                block = copy.deepcopy(model.get_submodule(name)).to(wide).eval()
                block.requires_grad_(False)
                targets = None if hidden is None or run is None else _targets(run, block, hidden)
                done = store.load(index)
                if done is None:
                    generator = Generator().manual_seed(seed * 1_000_003 + index)
                    fit = BlockFit(block, name, context, generator).to(device)
                    tensors, entry = _block(block, fit, run, hidden, targets, model.dtype, bar)
                    store.save(index, tensors, entry)
                else:
                    tensors, entry = done
                    bar.update(max(recipe.fit.epochs, 1))
                results.append({key: value.cpu() for key, value in tensors.items()})
                log.append(entry)
                hidden = targets
    return CalibrationResult(plan=plan, blocks=tuple(results), log=tuple(log))


def _block(
    block: nn.Module,
    fit: BlockFit,
    run: BlockRunner | None,
    hidden: Tensor | None,
    targets: Tensor | None,
    dtype: torch.dtype,
    bar: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit and merge one block."""
    recipe = fit.context.recipe
    if run is None or hidden is None or targets is None:
        bar.update(1)
        return merge_block(fit, dtype=dtype, hessian_of=None, on_note=_log.info), {
            "block": fit.name
        }
    if recipe.scales:
        fit.start_scales(_statistics(block, fit, run, hidden))

    def on_epoch(epoch: int, error: float) -> None:
        bar.set_postfix_str(f"{fit.name} mse {error:.3g}", refresh=False)
        bar.update(1)

    log = fit_block(block, fit, run, hidden, targets, recipe.fit, on_epoch)
    hessian_of = None
    if recipe.rounding.needs_hessian:
        hessian_of = _hessians(block, fit, run, hidden)
    notes: list[str] = []
    tensors = merge_block(fit, dtype=dtype, hessian_of=hessian_of, on_note=notes.append)
    for note in notes:
        _log.info(note)
    return tensors, {"block": fit.name, **_json(log), **({"notes": notes} if notes else {})}


def _json(log: FitLog) -> dict[str, float | None]:
    values = {"start": log.start, "end": log.end, "seconds": log.seconds}
    return {key: value if value == value else None for key, value in values.items()}


@torch.no_grad()
def _targets(run: BlockRunner, block: nn.Module, hidden: Tensor) -> Tensor:
    """FP output of the block, one sample at a time so that it does not depend on batching."""
    return torch.cat([run(block, part) for part in hidden.split(1)])


@torch.no_grad()
def _statistics(
    block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor
) -> dict[Site, InputStatistics]:
    """Statistics of the FP inputs of every site that has a scale."""
    family = fit.context.family
    collectors = {site: StatisticsCollector() for site in fit.context.recipe.scales}
    watched = {family.group(site).linears[0]: see for site, see in collectors.items()}
    with watching(block, watched):
        for part in hidden.split(1):
            run(block, part)
    return {site: collector.result() for site, collector in collectors.items()}


def _hessians(block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor) -> HessianOf:
    """Hessians in the order of the forward pass: earlier groups are already rounded."""
    family = fit.context.family
    cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def hessian_of(name: str) -> Tensor:
        group = next(g for g in family.groups if name in g.linears)
        if group.site.value not in cache:
            collector = HessianCollector()
            linear = fit.linears[group.linears[0]]
            shared = linear.group

            def see(x: Tensor) -> None:
                x = x.to(linear.weight.dtype)
                collector(shared.activation(x) if linear.online else x)

            # the stand-in is in the block only during the forward pass, so it is watched itself
            with watching(nn.ModuleDict({"linear": linear}), {"linear": see}):
                for part in hidden.split(fit.context.recipe.fit.batch_size):
                    forward_fit(block, fit, run, part, family.attention)
            if collector.hessian is None:
                raise RuntimeError(f"{name}: no input was seen")
            cache.clear()  # groups come one after the other: one K² at a time
            cache[group.site.value] = collector.hessian
        return cache[group.site.value]

    return hessian_of


def _check_ignored(model: nn.Module, plan: QuantizationPlan) -> None:
    """Warn of entries that name no linear: a typo there would quantize what must be left alone."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for entry in plan.ignore:
        alone = replace(plan, ignore=(entry,))
        if entry != "lm_head" and not any(alone.ignores(name) for name in linears):
            warnings.warn(f"ignore={entry!r} matches no linear of the model", stacklevel=3)


def _overridden(
    recipe: Recipe, epochs: int | None, weights: str | WeightQuantizer | None
) -> Recipe:
    if epochs is not None:
        recipe = replace(recipe, fit=replace(recipe.fit, epochs=epochs))
    return recipe if weights is None else replace(recipe, weights=weights)


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """Our attention function, which knows `kv_fit`, for the time of the calibration."""
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _bar(blocks: int, recipe: Recipe, progress: bool) -> Iterator[Any]:
    per_block = max(recipe.fit.epochs, 1) if recipe.needs_data else 1
    with tqdm(
        total=blocks * per_block,
        desc=f"{recipe.method} {recipe.scheme}",
        unit="epoch",
        disable=not progress or not recipe.needs_data,
        smoothing=0.05,
    ) as bar:
        yield bar


DATA_FREE = {"identity": "rtn", "hadamard": "hadamard", "random": "random"}
"""Transforms that `replace_linear` can make without calibration text -> method."""


def replace_linear(
    model: PreTrainedModel,
    scheme: str | Scheme = "W4A4",
    *,
    transform: str | CalibrationResult = "hadamard",
    ignore: str | tuple[str, ...] = ("lm_head",),
    seed: int = 0,
) -> PreTrainedModel:
    """Replace the decoder's linears by integer ones, in place; returns the model.

    What was replaced, what was left alone and why is logged (logger "flatquant", level INFO);
    `flatquant.report` says it at any time.

    Args:
        model: a Hugging Face causal LM of a known family.
        scheme: what to quantize; ignored in favour of the result's own where one is given.
        transform: "identity", "hadamard" or "random" (orthogonal) for round-to-nearest without
            calibration text, or the `CalibrationResult` to install.
        ignore: linears to leave alone, by full name, or "re:pattern".
        seed: of random transforms.

    Raises:
        ValueError: unknown transform or family, a model that is quantized already, a result
            that was made from another model.
    """
    if isinstance(transform, CalibrationResult):
        result = transform
    elif transform in DATA_FREE:
        result = calibrate(
            model, DATA_FREE[transform], scheme, seed=seed, ignore=ignore, progress=False
        )
    else:
        raise ValueError(
            f"replace_linear: transform={transform!r} must be one of {list(DATA_FREE)} or a "
            "CalibrationResult"
        )
    result.apply(model)
    attach(model)
    _log.info("%s", report(model))
    return model


def quantize(
    model: PreTrainedModel,
    method: str | Recipe = "flatquant",
    scheme: str | Scheme = "W4A4KV4",
    calibration: Tensor | None = None,
    *,
    epochs: int | None = None,
    weights: str | WeightQuantizer | None = None,
    seed: int = 0,
    ignore: str | tuple[str, ...] = ("lm_head",),
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """`calibrate`, then `replace_linear` with its result: in place, returns the model.

    Arguments and errors are those of `calibrate`.
    """
    result = calibrate(
        model,
        method,
        scheme,
        calibration,
        epochs=epochs,
        weights=weights,
        seed=seed,
        ignore=ignore,
        work_dir=work_dir,
        resume=resume,
        progress=progress,
    )
    return replace_linear(model, transform=result)
