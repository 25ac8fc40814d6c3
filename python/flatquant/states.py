"""Hidden states on their way through the blocks: the original's, and the quantized model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flatquant.capture import BlockRunner
from flatquant.fit.modules import FitContext
from flatquant.recipe import FitConfig
from flatquant.result import load_block
from flatquant.surgery import install_block


class Stream:
    """The calibration text between two blocks.

    `exact` [samples, tokens, hidden] is what the original model has in front of the block, and
    `quantized`, if the fit asks for it, what is there once the blocks before are quantized.

    Args:
        run: calls a block.
        hidden: hidden states in front of the first block.
        config: says on what blocks are fitted.
    """

    def __init__(self, run: BlockRunner, hidden: Tensor, config: FitConfig) -> None:
        self.run = run
        self.config = config
        self.exact = hidden
        self.quantized = hidden if config.inputs == "quantized" else None
        self._outputs: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the block is fitted on."""
        return self.exact if self.quantized is None else self.quantized

    def outputs(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output of a block, one sample at a time so that it does not depend on batching."""
        with torch.no_grad():
            return torch.cat([self.run(block, part) for part in hidden.split(1)])

    def targets(self, block: nn.Module) -> Tensor:
        """What the fitted block should give on `inputs`; `block` is the original."""
        if self._outputs is None:
            self._outputs = self.outputs(block, self.exact)
        if self.quantized is None or not self.config.augmented:
            return self._outputs
        return (self._outputs + self.outputs(block, self.quantized)) / 2

    def move_on(self, block: nn.Module, deploy: Callable[[], nn.Module]) -> None:
        """Go behind the block; `deploy` makes the quantized one, if it is needed."""
        after = self.outputs(block, self.exact) if self._outputs is None else self._outputs
        if self.quantized is not None:
            self.quantized = self.outputs(deploy(), self.quantized)
        self.exact, self._outputs = after, None


def quantized_block(
    block: nn.Module, name: str, context: FitContext, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the block as it will be deployed, with its integer kernels."""
    deployed = copy.deepcopy(block)
    plan = context.plan.keeping(name, context.family, tensors)
    install_block(deployed, name, context.family, context.geometry, plan)
    load_block(deployed, name, tensors)
    return deployed.eval()
