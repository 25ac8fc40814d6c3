"""The one training loop: fit the free numbers of a block to the block's own FP output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner
from flatquant.fit.modules import BEFORE_ROUNDING, BlockFit
from flatquant.recipe import FitConfig
from flatquant.surgery import swapped


class FitDivergedError(RuntimeError):
    """A loss that is not finite, or a singular solve: says where, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class FitLog:
    """What fitting one block did.

    Attributes:
        start: error of the block output over the first epoch, as `FitConfig.loss` counts it.
        end: the same over the last one.
        seconds: wall time.
    """

    start: float
    end: float
    seconds: float


def learning_rate(step: int, total: int, peak: float, config: FitConfig) -> float:
    """Cosine from `peak` to `min_lr` over all steps, or `peak`, after an optional warm-up."""
    if step < config.warmup_steps:
        return peak * (0.01 + 0.99 * step / config.warmup_steps)
    if config.schedule == "constant":
        return peak
    cosine = (1 + math.cos(math.pi * step / max(total, 1))) / 2
    return config.min_lr + (peak - config.min_lr) * cosine


def _mean_squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _moments(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the channels of |μ − μ'| + |σ² − σ'²|, the moments taken over all tokens."""
    rows, wanted = (x.reshape(-1, x.shape[-1]) for x in (output, target))
    means = (rows.mean(0) - wanted.mean(0)).abs()
    variances = (rows.var(0, correction=0) - wanted.var(0, correction=0)).abs()
    return (means + variances).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mean_squared,
    "moments": _moments,
}
"""Errors of (output, target), both [batch, tokens, hidden], by their names in `FitConfig.loss`."""


def forward_fit(
    block: nn.Module, fit: BlockFit, run: BlockRunner, hidden: Tensor, attention: str
) -> Tensor:
    """Output of the block with its learnable stand-ins in place."""
    fit.refresh()
    module = block.get_submodule(attention)
    with swapped(block, fit.replacements()):
        # a plain attribute: the attention function looks for it (runtime/attention.py)
        object.__setattr__(module, "kv_fit", fit.heads)
        try:
            return run(block, hidden)
        finally:
            object.__delattr__(module, "kv_fit")


def fit_block(
    block: nn.Module,
    fit: BlockFit,
    run: BlockRunner,
    inputs: Tensor,
    targets: Tensor,
    config: FitConfig,
    on_epoch: Callable[[int, float], None],
    *,
    kinds: Sequence[str] = BEFORE_ROUNDING,
    depth: float = 0.0,
) -> FitLog:
    """Minimise the error between the quantized block's output and `targets`.

    The loss is divided by its own detached value, i.e. the gradient is that of log MSE, so one
    learning rate serves blocks whose errors differ by orders of magnitude (the authors' code).

    Args:
        block: the FP block; unchanged.
        fit: its learnable parts; changed.
        run: calls the block.
        inputs, targets: [samples, tokens, hidden] float32.
        config: epochs, rates, batch size.
        on_epoch: called with the epoch and its mean error.
        kinds: of parameters that may change.
        depth: of the block in the model, for `FitConfig.lr_growth`.

    Raises:
        FitDivergedError: naming block, epoch and remedy.
    """
    began = time.monotonic()
    peaks = {"scales": config.scale_lr, "clips": config.clip_lr}
    growth = 1 + config.lr_growth * depth
    groups = [
        {"params": params, "peak": peaks.get(kind, config.lr) * growth}
        for kind, params in fit.parameter_groups().items()
        if params and kind in kinds
    ]
    if not groups or config.epochs == 0:
        return FitLog(start=math.nan, end=math.nan, seconds=0.0)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    size = config.batch_size
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    total = config.epochs * math.ceil(len(batches) / config.accumulate)
    attention = fit.context.family.attention
    error_of = LOSSES[config.loss]
    start, mean, step = math.nan, math.nan, 0
    for epoch in range(config.epochs):
        losses: list[float] = []
        fit.advance(epoch / max(config.epochs - 1, 1))
        for index, (hidden, target) in enumerate(batches):
            if index % config.accumulate == 0:
                optimizer.zero_grad(set_to_none=True)
            try:
                output = forward_fit(block, fit, run, hidden, attention)
            except torch.linalg.LinAlgError as error:
                raise _diverged(fit.name, epoch, "a transform became singular") from error
            loss = error_of(output.to(target.dtype), target)
            value = loss.item()
            if not math.isfinite(value):
                raise _diverged(fit.name, epoch, f"the loss is {value}")
            losses.append(value)
            if value > 0:
                (loss / (value * config.accumulate)).backward()
            if index % config.accumulate == config.accumulate - 1 or index == len(batches) - 1:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, group["peak"], config)
                optimizer.step()
                step += 1
        mean = sum(losses) / len(losses)
        if epoch == 0:
            start = mean
        on_epoch(epoch, mean)
    return FitLog(start=start, end=mean, seconds=time.monotonic() - began)


def _diverged(block: str, epoch: int, what: str) -> FitDivergedError:
    return FitDivergedError(
        f"{block}, epoch {epoch}: {what}. Remedy: amp='off', or a smaller lr (half), or fewer "
        "epochs; blocks finished so far are kept in work_dir and resume=True continues from them"
    )
