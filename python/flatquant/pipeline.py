"""The whole story of a calibration: text in, finished blocks out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flatquant.capture import (
    BlockRunner,
    check_tokens,
    first_block_inputs,
)
from flatquant.fit.block import FitLog, fit_block
from flatquant.fit.clips import start_clips
from flatquant.fit.columns import choose_columns
from flatquant.fit.end_to_end import LearnedRotations, learn_rotations
from flatquant.fit.hessians import hessians
from flatquant.fit.modules import AFTER_ROUNDING, BEFORE_ROUNDING, BlockFit, FitContext
from flatquant.fit.precision import amp_pays
from flatquant.fit.residual import Residual, start_residual
from flatquant.fit.scales import set_scales
from flatquant.fit.spans import find_spans
from flatquant.merge import merge_block, norm_weights
from flatquant.methods import resolve
from flatquant.models import family_of
from flatquant.models.spec import check_weights
from flatquant.offload import float_block, shards_of
from flatquant.plan import QuantizationPlan
from flatquant.recipe import Recipe
from flatquant.result import CalibrationResult, StoredBlocks
from flatquant.runtime.attention import register
from flatquant.runtime.cache import ATTENTION
from flatquant.scheme import Scheme
from flatquant.states import Stream, quantized_block
from flatquant.surgery import block_names
from flatquant.transforms import online_splits
from flatquant.weights import WeightQuantizer
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
    device: str | torch.device | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> CalibrationResult:
    """Fit a method to a model, block by block; the model itself is not changed.

    Every block is fitted to its own floating-point output on the floating-point output of the
    block before it (FlatQuant, section 3.2), or on what the quantized blocks before it give
    (`FitConfig.inputs`), merged in float64 and rounded. Memory beyond the model: one block in
    float32, and the hidden states of the calibration text twice, with quantized inputs four
    times. With `work_dir` finished blocks are on disk only, and with `flatquant.open_model` the
    model's own are, too: then nothing grows with the number of blocks.

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
        device: where blocks are fitted, one at a time, and hidden states are kept; None: where
            the model's embedding is. The model itself may be elsewhere.
        work_dir: folder that keeps every finished block, and with it the result.
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
        check_weights(float_block(model, name, copied=False), family, name)
    geometry = family.geometry(model.config)
    plan = QuantizationPlan(
        scheme=recipe.scheme,
        sites=frozenset(recipe.transforms),
        splits=online_splits(recipe.transforms, geometry),
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        method=recipe.method,
    )
    _check_ignored(model, plan)
    device = model.get_input_embeddings().weight.device if device is None else torch.device(device)
    context = FitContext(
        recipe=recipe,
        plan=plan,
        family=family,
        geometry=geometry,
        amp=amp_pays(recipe.fit.amp, device),
    )
    residual = start_residual(
        recipe, family, geometry, Generator().manual_seed(seed * 1_000_003 + len(names))
    ).to(device)
    wide = torch.promote_types(model.dtype, torch.float32)
    with _attention(model), torch.enable_grad():  # the caller may have it switched off
        stream = None
        if recipe.needs_data:
            vocabulary = model.get_input_embeddings().weight.shape[0]
            tokens = check_tokens(calibration, vocabulary, f"method {recipe.method!r}")
            hidden, run = first_block_inputs(model, family, tokens, recipe.fit.batch_size)
            hidden, run = hidden.to(device), run.to(device)
        store = WorkDir(work_dir, resume, fingerprint(model, recipe, plan, seed, calibration))
        results: list[Mapping[str, Tensor]] = []
        log: list[Mapping[str, Any]] = []
        with _bar(len(names), recipe, progress) as bar:
            if recipe.needs_data:
                if recipe.end_to_end is not None:
                    _check_resident(model, recipe)
                    learned = _rotations(
                        model, context, residual, run, tokens, hidden, seed, store, bar
                    )
                    residual, context = learned.place(residual, context)
                stream = Stream(run, residual.enter(hidden), recipe.fit)
            for index, name in enumerate(names):
                block = float_block(model, name).to(device, wide).eval()
                block.requires_grad_(False)
                residual.rotate(block)
                done = store.load(index)
                if done is None:
                    generator = Generator().manual_seed(seed * 1_000_003 + index)
                    fit = BlockFit(block, name, context, generator).to(device)
                    depth = index / len(names)
                    tensors, entry = _block(block, fit, stream, depth, model.dtype, bar)
                    tensors |= residual.unquantized(block, tensors, model.get_submodule(name))
                    store.save(index, tensors, entry)
                else:
                    tensors, entry = done
                    bar.update(max(recipe.fit.epochs, 1))
                if store.folder is None:
                    results.append({key: value.cpu() for key, value in tensors.items()})
                log.append(entry)
                plan = plan.keeping(name, family, tensors)
                if stream is not None:
                    deploy = partial(quantized_block, block, name, context, tensors)
                    stream.move_on(block, deploy)
    blocks = tuple(results) if store.folder is None else StoredBlocks(store.folder, len(names))
    outer = residual.to(model.get_input_embeddings().weight.device).outer(model)
    return CalibrationResult(plan=plan, blocks=blocks, log=tuple(log), outer=outer)


def _block(
    block: nn.Module,
    fit: BlockFit,
    stream: Stream | None,
    depth: float,
    dtype: torch.dtype,
    bar: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit and merge one block; `depth` of it in the model, from 0 to below 1."""
    recipe = fit.context.recipe
    if stream is None:
        bar.update(1)
        return merge_block(fit, dtype=dtype, hessian_of=None, on_note=_log.info), {
            "block": fit.name
        }
    run, hidden, targets = stream.run, stream.inputs, stream.targets(block)
    notes = set_scales(block, fit, run, hidden)
    start_clips(block, fit, run, hidden)
    choose_columns(block, fit, run, hidden)

    def on_epoch(epoch: int, error: float) -> None:
        bar.set_postfix_str(f"{fit.name} mse {error:.3g}", refresh=False)
        bar.update(1)

    def fitted(kinds: tuple[str, ...]) -> FitLog:
        return fit_block(
            block, fit, run, hidden, targets, recipe.fit, on_epoch, kinds=kinds, depth=depth
        )

    log = fitted(BEFORE_ROUNDING)
    find_spans(block, fit, run, hidden)
    hessian_of = None
    if recipe.rounding.needs_hessian:
        hessian_of = hessians(block, fit, run, hidden)
    tensors = merge_block(fit, dtype=dtype, hessian_of=hessian_of, on_note=notes.append)
    if recipe.tweak_norms:
        log = fitted(AFTER_ROUNDING)
        tensors.update(norm_weights(fit, model_dtype=dtype))
    for note in notes:
        _log.info(note)
    return tensors, {"block": fit.name, **_json(log), **({"notes": notes} if notes else {})}


def _rotations(
    model: PreTrainedModel,
    context: FitContext,
    residual: Residual,
    run: BlockRunner,
    tokens: Tensor,
    hidden: Tensor,
    seed: int,
    store: WorkDir,
    bar: Any,
) -> LearnedRotations:
    """Learn rotations through the whole model, or read those that an earlier call has learned."""
    done = store.load_rotations()
    if done is not None:
        return LearnedRotations.from_tensors(*done).to(hidden.device)

    def on_step(step: int, loss: float) -> None:
        bar.set_postfix_str(f"rotations, step {step}: loss {loss:.4g}")

    learned = learn_rotations(model, context, residual, run, tokens, hidden, seed, on_step)
    store.save_rotations(learned.tensors(), learned.entry())
    _log.info("rotations: %s", learned)
    return learned


def _json(log: FitLog) -> dict[str, float | None]:
    values = {"start": log.start, "end": log.end, "seconds": log.seconds}
    return {key: value if value == value else None for key, value in values.items()}


def _check_resident(model: PreTrainedModel, recipe: Recipe) -> None:
    if shards_of(model) is not None:
        raise ValueError(
            f"method {recipe.method!r} learns through all blocks at once: open_model leaves them "
            "on disk; load the model with from_pretrained"
        )


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
