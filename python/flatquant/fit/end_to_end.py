"""Rotations learned through the whole model (SpinQuant, arXiv 2405.16406, section 3).

Minimised is the loss of the next token, with everything fake-quantized that the method quantizes,
over the matrices at RESIDUAL and V_HEAD. Blocks are the learnable ones of `modules`, whose base
weights are turned before every step; their activations are computed again in the backward pass,
so that memory beyond the weights is that of one block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from flatquant.capture import BlockRunner
from flatquant.fit.block import FitDivergedError, forward_fit
from flatquant.fit.group import GroupFit, NormFit
from flatquant.fit.linear import LinearFit
from flatquant.fit.modules import BlockFit, FitContext
from flatquant.fit.residual import Residual
from flatquant.models.spec import Site
from flatquant.recipe import EndToEnd
from flatquant.scheme import Scheme
from flatquant.surgery import block_names, replace_module
from flatquant.transforms.kronecker import Kronecker
from flatquant.transforms.matrices import Fixed
from flatquant.transforms.rotation import Turn
from flatquant.transforms.stiefel import Stiefel


@dataclass(frozen=True, kw_only=True)
class LearnedRotations:
    """What was learned.

    Attributes:
        residual: R1 [hidden, hidden] float64, or None.
        values: name of a block -> its R2 [head_dim, head_dim] float64.
        losses: of every step.
        seconds: wall time.
    """

    residual: Tensor | None
    values: Mapping[str, Tensor]
    losses: tuple[float, ...] = ()
    seconds: float = 0.0

    def place(self, residual: Residual, context: FitContext) -> tuple[Residual, FitContext]:
        """The rotation and the context of a run that uses what was learned."""
        if self.residual is not None:
            residual = Residual(residual.family, Turn(left=None, right=self.residual))
        given = {
            (name, Site.V_HEAD): Kronecker(None, Fixed(matrix))
            for name, matrix in self.values.items()
        }
        return residual, replace(context, given=given)

    def to(self, device: torch.device) -> LearnedRotations:
        """The same on another device."""
        own = None if self.residual is None else self.residual.to(device)
        return replace(
            self, residual=own, values={name: r2.to(device) for name, r2 in self.values.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """For a file: "residual", and block names."""
        own = {} if self.residual is None else {Site.RESIDUAL.value: self.residual}
        return {**self.values, **own}

    def entry(self) -> dict[str, Any]:
        """For a file beside it."""
        return {"losses": list(self.losses), "seconds": self.seconds}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]
    ) -> LearnedRotations:
        """Inverse of `tensors` and `entry`."""
        values = {name: tensor for name, tensor in tensors.items() if name != Site.RESIDUAL.value}
        return cls(
            residual=tensors.get(Site.RESIDUAL.value),
            values=values,
            losses=tuple(entry["losses"]),
            seconds=entry["seconds"],
        )

    def __str__(self) -> str:
        if not self.losses:
            return "nothing to learn"
        return f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g} in {self.seconds:.0f} s"


class _TurningBlock:
    """A learnable block whose base weights are turned anew at every step."""

    def __init__(
        self,
        block: nn.Module,
        name: str,
        context: FitContext,
        generator: Generator,
        device: torch.device,
    ) -> None:
        self.block = block
        self.attention = context.family.attention
        self.fit = BlockFit(block, name, context, generator)
        _cover(self.fit, block)
        config = context.recipe.end_to_end
        for linear, stand_in in self.fit.linears.items():
            replace_module(block, linear, nn.Identity())  # the stand-in has the weight
            if config is not None and not config.round_weights:
                stand_in.scheme = Scheme()
        self.fit.to(device)
        self.values: Stiefel | None = None
        if self.fit.values is not None:
            start = self.fit.values.freeze().right
            assert start is not None
            self.values = Stiefel(start).to(device)
            self.fit.values = Kronecker(None, self.values)
        self.fit.requires_grad_(False)
        if self.values is not None:
            self.values.requires_grad_(True)
        self.base = {name: (fit.weight, fit.bias) for name, fit in self.fit.linears.items()}

    def turn(self, residual: Residual) -> list[tuple[Tensor, Tensor]]:
        """Turn the base weights; pairs of a turned tensor and the leaf that stands in for it.

        Every forward pass of a step adds to the gradients of the leaves, and one backward pass
        at its end takes them from there to the rotation.
        """
        pairs = []
        for name, (weight, bias) in self.base.items():
            turned = residual.turned(name, weight, bias)
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
                for tensor in turned
            ]
            self.fit.linears[name].weight, self.fit.linears[name].bias = leaves  # type: ignore[assignment]
            pairs += [
                (tensor, leaf)
                for tensor, leaf in zip(turned, leaves, strict=True)
                if tensor is not None and leaf is not None and leaf.requires_grad
            ]
        return pairs

    def __call__(self, run: BlockRunner, hidden: Tensor) -> Tensor:
        """Output of the quantized block; its inside is computed again in the backward pass."""

        def inner(hidden: Tensor) -> Tensor:
            return forward_fit(self.block, self.fit, run, hidden, self.attention)

        result: Tensor = checkpoint(inner, hidden, use_reentrant=False)
        return result.to(hidden.dtype)


def _cover(fit: BlockFit, block: nn.Module) -> None:
    """Stand-ins also for what is not quantized: it turns with the rest."""
    neutral = GroupFit(None, None, Scheme())
    amp = fit.context.amp
    for group in fit.context.family.groups:
        for name in group.linears:
            module = block.get_submodule(name)
            if name not in fit.linears and isinstance(module, nn.Linear):
                fit.linears[name] = LinearFit(module, neutral, online=False, amp=amp)
        if group.norm is not None and group.norm not in fit.norms:
            fit.norms[group.norm] = NormFit(block.get_submodule(group.norm), neutral)


class _TurningModel:
    """The fake-quantized model in the basis of rotations that are learned.

    Attributes:
        matrices: what is learned: R1, if the recipe has it, and then R2 of every block.
    """

    def __init__(
        self,
        model: nn.Module,
        context: FitContext,
        residual: Residual,
        run: BlockRunner,
        hidden: Tensor,
        seed: int,
    ) -> None:
        self.run, self.hidden = run, hidden
        self.blocks: list[_TurningBlock] = []
        for index, name in enumerate(block_names(model, context.family)):
            block = deepcopy(model.get_submodule(name)).to(hidden).eval()
            residual.fold_norms(block.requires_grad_(False))
            generator = Generator().manual_seed(seed * 1_000_003 + index)
            self.blocks.append(_TurningBlock(block, name, context, generator, hidden.device))
        self.stream: Stiefel | None = None
        if residual.turn is not None:
            eye = torch.eye(hidden.shape[-1], dtype=torch.float64, device=hidden.device)
            self.stream = Stiefel(residual.turn.apply(eye))
            residual = Residual(residual.family, Turn(left=None, right=self.stream.matrix))
        self.residual = residual
        parts = (self.stream, *(block.values for block in self.blocks))
        self.matrices = [found for found in parts if found is not None]
        names = (context.family.final_norm, context.family.head)
        tail = (deepcopy(model.get_submodule(name)) for name in names)
        self.tail = nn.Sequential(*tail).to(hidden).requires_grad_(False)

    def loss(self, sample: int, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the next token of one sample; tokens: int64 [tokens]."""
        x = self.residual.enter(self.hidden[sample : sample + 1])
        for block in self.blocks:
            x = block(self.run, x)
        logits = self.tail(self.residual.leave(x))[0, :-1]
        return cross_entropy(logits, tokens[1:].to(logits.device))

    def backward(self, samples: Iterable[int], tokens: Tensor, count: int) -> float:
        """Gradients of the mean loss of `count` samples; returns that loss."""
        pairs = [pair for block in self.blocks for pair in block.turn(self.residual)]
        total = 0.0
        for sample in samples:
            loss = self.loss(sample, tokens[sample]) / count
            loss.backward()
            total += loss.item()
        if pairs:
            turned, leaves = zip(*pairs, strict=True)
            torch.autograd.backward(turned, [leaf.grad for leaf in leaves])
        return total


def learn_rotations(
    model: nn.Module,
    context: FitContext,
    residual: Residual,
    run: BlockRunner,
    tokens: Tensor,
    hidden: Tensor,
    seed: int,
    on_step: Callable[[int, float], None],
) -> LearnedRotations:
    """Cayley SGD on the next-token loss of the fake-quantized model.

    Args:
        model: the floating-point model; unchanged.
        context: of the run; its recipe says where rotations are, how they start and are learned.
        residual: R1 at its start.
        run: calls a block.
        tokens: int64 [samples, tokens].
        hidden: embeddings of `tokens`, [samples, tokens, hidden] float32.
        seed: of the start values, as the run's own, and of the order of the samples.
        on_step: called with the step and its loss.

    Raises:
        FitDivergedError: a loss that is not finite.
    """
    began = time.monotonic()
    config = context.recipe.end_to_end or EndToEnd()
    turning = _TurningModel(model, context, residual, run, hidden, seed)
    order = _order(len(tokens), Generator().manual_seed(seed))
    losses: list[float] = []
    for step in range(config.steps if turning.matrices else 0):
        batch = islice(order, config.batch_size)
        loss = turning.backward(batch, tokens, config.batch_size)
        if not math.isfinite(loss):
            raise FitDivergedError(f"rotations, step {step}: the loss is {loss}; use a smaller lr")
        for matrix in turning.matrices:
            matrix.step(config.lr * (1 - step / config.steps))
        losses.append(loss)
        on_step(step, loss)
    stream = turning.stream
    return LearnedRotations(
        residual=None if stream is None else stream.exact,
        values={b.fit.name: b.values.exact for b in turning.blocks if b.values is not None},
        losses=tuple(losses),
        seconds=time.monotonic() - began,
    )


def _order(samples: int, generator: Generator) -> Iterator[int]:
    """Indices of samples without end, every one once in each round."""
    while True:
        yield from torch.randperm(samples, generator=generator).tolist()
