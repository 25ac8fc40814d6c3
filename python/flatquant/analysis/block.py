"""What happens to the windows of a text inside one block of the two models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatquant.analysis.bases import LinearBasis, owner_of, prepared_input
from flatquant.analysis.meters import (
    ByPosition,
    ChannelMaxima,
    Closeness,
    Moments,
    bin_starts,
    heatmap,
)
from flatquant.analysis.stream import Stream
from flatquant.analysis.tables import Cell, Rows
from flatquant.capture import Call, recording
from flatquant.models.spec import FamilySpec, Group, Site
from flatquant.runtime.norm import QuantizedNorm


class _Input:
    """Meters of one group's input, before or after the transform."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.maxima = ChannelMaxima()
        self.map: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        if self.map is None:
            self.map = heatmap(x[0])
        self.moments(x)
        self.maxima(x)


class BlockMeter:
    """Runs a block of both models over the windows and measures.

    Args:
        fp_block: of the floating-point model.
        block: of the quantized one.
        family: of both.
        bases: from `linear_bases`.
        rotation: R of the residual stream, or None.
    """

    def __init__(
        self,
        fp_block: nn.Module,
        block: nn.Module,
        family: FamilySpec,
        bases: dict[str, LinearBasis],
        rotation: Tensor | None,
    ) -> None:
        self.fp_block, self.block, self.family = fp_block, block, family
        self.bases, self.rotation = bases, rotation
        self.inputs = {
            (group.site, when): _Input() for group in family.groups for when in ("before", "after")
        }
        self.outputs = {name: Closeness() for name in bases}
        self.together, self.alone, self.power = ByPosition(), ByPosition(), ByPosition()
        self.tokens = 0

    @torch.no_grad()
    def run(self, fp: Stream, quantized: Stream, batch_size: int) -> None:
        """Move both streams past the block."""
        self.tokens = fp.hidden.shape[1]
        names = list(self.bases)
        norms = [group.norm for group in self.family.groups if group.norm is not None]
        for start in range(0, len(fp.hidden), batch_size):
            part = slice(start, start + batch_size)
            clean, noisy = fp.hidden[part], quantized.hidden[part]
            with recording(self.fp_block, names) as theirs:
                target = fp.through(self.fp_block, clean)
            fed = clean if self.rotation is None else clean @ self.rotation
            with recording(self.block, [*names, *norms]) as ours:
                alone = quantized.through(self.block, fed)
            self._see(theirs, ours)
            same = torch.equal(fed, noisy)
            result = alone if same else quantized.through(self.block, noisy)
            self.power(target)
            self.alone(self._plain(alone) - target)
            self.together(self._plain(result) - target)
            fp.hidden[part], quantized.hidden[part] = target, result

    def _plain(self, hidden: Tensor) -> Tensor:
        """Hidden states of the quantized model in the floating-point model's basis."""
        return hidden if self.rotation is None else hidden @ self.rotation.mT

    def _see(self, theirs: dict[str, list[Call]], ours: dict[str, list[Call]]) -> None:
        for group in self.family.groups:
            before = theirs[group.linears[0]][0].args[0]
            self.inputs[group.site, "before"](before)
            self.inputs[group.site, "after"](self._prepared(group, ours))
            for name in group.linears:
                target = self.bases[name].output.apply(theirs[name][0].output.float())
                self.outputs[name](ours[name][0].output, target)

    def _prepared(self, group: Group, ours: dict[str, list[Call]]) -> Tensor:
        owner = owner_of(self.block, group)
        called = group.norm if isinstance(owner, QuantizedNorm) else group.linears[0]
        assert called is not None
        seen: Any = ours[called][0].args[0]
        if not isinstance(seen, Tensor):  # the MLP has handed over codes
            gate, up = (ours[n][0].output for n in self.family.group(Site.MLP_IN).linears)
            seen = self.block.get_submodule(self.family.mlp).act_fn(gate) * up  # type: ignore[operator]
        return prepared_input(owner, seen)

    def report(self, layer: int, rows: Rows) -> None:
        """Write the rows of this block, all but the heat map's."""
        for group in self.family.groups:
            for when in ("before", "after"):
                meter = self.inputs[group.site, when]
                for name in group.linears:
                    rows.add("kurtosis", layer, name, "input", when, meter.moments.kurtosis)
                for quantile, magnitude in meter.maxima.curve():
                    rows.add(
                        "magnitudes", layer, group.site.value, "input", when, quantile, magnitude
                    )
        for name, found in self.outputs.items():
            rows.add("similarity", layer, name, found.cosine, found.sqnr_db)
        lines = (self.together.binned(), self.alone.binned(), self.power.binned())
        for token, *values in zip(bin_starts(self.tokens), *lines, strict=True):
            rows.add("surface", layer, token, *values)

    @property
    def tails(self) -> float:
        """The heaviest tails among the normalised inputs: which heat map is worth a look."""
        return max(
            self.inputs[group.site, "before"].moments.kurtosis
            for group in self.family.groups
            if group.norm is not None
        )

    def heatmaps(self, layer: int) -> list[tuple[Cell, ...]]:
        """Rows of the heat map of every site, in the first window."""
        rows: list[tuple[Cell, ...]] = []
        for (site, when), meter in self.inputs.items():
            assert meter.map is not None
            for token, line in enumerate(meter.map.tolist()):
                rows += [(layer, site.value, when, token, c, v) for c, v in enumerate(line)]
        return rows
