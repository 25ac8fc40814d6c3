"""Pruning: some weights become 0, the others are rounded as usual."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.feedback import Feedback
from flatquant.weights.rtn import Rtn


@dataclass(frozen=True, kw_only=True)
class Pruned(WeightQuantizer):
    """The least important weights are set to 0, then the rest is rounded by another quantizer.

    Zeros are codes like any other: no kernel here skips them. Where a scheme leaves weights
    in floating point they are pruned all the same.

    Attributes:
        sparsity: share of weights that become 0.
        pattern: (kept, of): keep so many of every so many neighbouring inputs, e.g. (2, 4),
            whatever `sparsity` says; None prunes without a pattern.
        then: how the other weights are rounded.

    Raises:
        ValueError: settings that make no sense, or a quantizer with feedback, which would move
            errors onto weights that have to stay 0 (SparseGPT is the method that prevents it).
    """

    sparsity: float = 0.5
    pattern: tuple[int, int] | None = None
    then: WeightQuantizer = field(default_factory=Rtn)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"{name}: sparsity={self.sparsity} must lie in [0, 1)")
        if self.pattern is not None and not 0 < self.pattern[0] <= self.pattern[1]:
            raise ValueError(f"{name}: pattern={self.pattern} must be (kept, of), 0 < kept <= of")
        if isinstance(self.then, Feedback):
            raise ValueError(
                f"{name}: then={type(self.then).__name__} moves errors onto weights that are 0"
            )

    @property
    def prunes(self) -> bool:
        """Always."""
        return True

    @abstractmethod
    def importance(self, task: WeightTask) -> Tensor:
        """How much each weight matters, [out, in]; compared within what `rivals` shapes."""

    @abstractmethod
    def rivals(self, importance: Tensor) -> Tensor:
        """The same numbers as [sets, size]: the least of every set are pruned."""

    def keeps(self, task: WeightTask) -> Tensor:
        """Which weights stay, bool [out, in]; of equal ones the later inputs.

        Raises:
            ValueError: a pattern that does not divide the inputs.
        """
        importance = self.importance(task)
        if self.pattern is None:
            sets = self.rivals(importance)
            count = int(sets.shape[1] * self.sparsity)
        else:
            kept, of = self.pattern
            if importance.shape[1] % of:
                raise ValueError(
                    f"{task.name}: a pattern of {kept} in {of} does not divide its "
                    f"{importance.shape[1]} inputs"
                )
            sets = importance.reshape(-1, of)
            count = of - kept
        keep = torch.ones_like(sets, dtype=torch.bool)
        order = sets.argsort(dim=1, stable=True)
        keep.scatter_(1, order[:, :count], False)
        return keep.reshape(importance.shape)

    def quantize(self, task: WeightTask) -> QuantizedWeight:
        """Codes of the pruned weight; those of pruned weights stand for 0 exactly.

        Raises:
            ValueError: no Hessian where one is needed; a grid without a 0.
        """
        keep = self.keeps(task)
        rounded = self.then.quantize(replace(task, weight=task.weight * keep))
        zero = rounded.codes.new_zeros(rounded.codes.shape)
        if rounded.zero is not None:
            if not bool((rounded.zero == rounded.zero.round()).all()):
                raise ValueError(
                    f"{task.name}: {type(self.then).__name__} gives this grid a zero point "
                    "between two codes, so no code is 0; use the symmetric grid"
                )
            groups = rounded.zero.reshape(len(zero), -1, 1).to(zero.dtype)
            zero = groups.expand(-1, -1, zero.shape[1] // groups.shape[1]).reshape(zero.shape)
        return replace(rounded, codes=torch.where(keep, rounded.codes, zero))


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruned):
    """Importance |w|, compared over the whole matrix (the baseline of arXiv 2306.11695)."""

    @property
    def needs_hessian(self) -> bool:
        """Only if the rounding does."""
        return self.then.needs_hessian

    def importance(self, task: WeightTask) -> Tensor:
        """|w|."""
        return task.weight.abs()

    def rivals(self, importance: Tensor) -> Tensor:
        """All weights."""
        return importance.reshape(1, -1)


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruned):
    """Importance |w|·‖x‖₂, compared within each output (Wanda, arXiv 2306.11695, equation 1)."""

    @property
    def needs_hessian(self) -> bool:
        """Its diagonal holds the squared norms of the inputs."""
        return True

    def importance(self, task: WeightTask) -> Tensor:
        """|w|·‖x‖₂."""
        return task.weight.abs() * task.needed_hessian("wanda").diagonal().sqrt()

    def rivals(self, importance: Tensor) -> Tensor:
        """The weights of one output."""
        return importance
