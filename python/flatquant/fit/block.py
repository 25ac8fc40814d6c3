"""The one training loop: fit the free numbers of a block to the block's own FP output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner
from flatquant.fit.modules import BlockFit
from flatquant.recipe import FitConfig
from flatquant.surgery import swapped


class FitDivergedError(RuntimeError):
    """A loss that is not finite, or a singular solve: says where, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class FitLog:
    """What fitting one block did.

    Attributes:
        start: mean squared error of the block output over the first epoch.
        end: the same over the last one.
        seconds: wall time.
    """

    start: float
    end: float
    seconds: float


def learning_rate(step: int, total: int, peak: float, config: FitConfig) -> float:
    """Cosine from `peak` to `min_lr` over all steps, after an optional linear warm-up."""
    if step < config.warmup_steps:
        return peak * (0.01 + 0.99 * step / config.warmup_steps)
    cosine = (1 + math.cos(math.pi * step / max(total, 1))) / 2
    return config.min_lr + (peak - config.min_lr) * cosine


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
) -> FitLog:
    """Minimise the mean squared error between the quantized block's output and `targets`.

    The loss is divided by its own detached value, i.e. the gradient is that of log MSE, so one
    learning rate serves blocks whose errors differ by orders of magnitude (the authors' code).

    Args:
        block: the FP block; unchanged.
        fit: its learnable parts; changed.
        run: calls the block.
        inputs, targets: [samples, tokens, hidden] float32.
        config: epochs, rates, batch size.
        on_epoch: called with the epoch and its mean error.

    Raises:
        FitDivergedError: naming block, epoch and remedy.
    """
    began = time.monotonic()
    peaks = {"transforms": config.lr, "scales": config.scale_lr, "clips": config.clip_lr}
    groups = [
        {"params": params, "peak": peaks[kind]}
        for kind, params in fit.parameter_groups().items()
        if params
    ]
    if not groups or config.epochs == 0:
        return FitLog(start=math.nan, end=math.nan, seconds=0.0)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    size = config.batch_size
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    total = config.epochs * math.ceil(len(batches) / config.accumulate)
    attention = fit.context.family.attention
    start, mean, step = math.nan, math.nan, 0
    for epoch in range(config.epochs):
        losses: list[float] = []
        for index, (hidden, target) in enumerate(batches):
            if index % config.accumulate == 0:
                optimizer.zero_grad(set_to_none=True)
            try:
                output = forward_fit(block, fit, run, hidden, attention)
            except torch.linalg.LinAlgError as error:
                raise _diverged(fit.name, epoch, "the Cayley map met a singular matrix") from error
            loss = (output.to(target.dtype) - target).square().mean()
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
