"""Site.RESIDUAL: a rotation of the whole residual stream, merged into everything around it.

With h' = h·R in place of h, a linear that reads the stream takes W·diag(γ)·R, where γ is the
weight of the norm in front of it, and one that writes to it Rᵀ·W. An RMSNorm without γ commutes
with every orthogonal R, so the model computes what it did (SliceGPT, arXiv 2401.15024, theorem 1;
QuaRot, arXiv 2404.00456, section 4). Nothing is left to do at run time, but embedding and head
differ afterwards: a head that was tied becomes a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from flatquant.models.spec import FamilySpec, Geometry, Site
from flatquant.recipe import Recipe
from flatquant.transforms.rotation import ROTATIONS, Turn

_ROWS = 8192
"""Rows of the embedding that are held in float64 at a time."""


class Residual:
    """What a rotation of the residual stream does to the parts of a model.

    Args:
        family: where the parts are.
        turn: the rotation; None leaves everything as it is.
    """

    def __init__(self, family: FamilySpec, turn: Turn | None) -> None:
        self.family = family
        self.turn = turn

    def to(self, device: torch.device) -> Residual:
        """The same on another device."""
        return Residual(self.family, None if self.turn is None else self.turn.to(device))

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states in front of the first block, [..., hidden], in the new basis."""
        return hidden if self.turn is None else self.turn.apply(hidden)

    def leave(self, hidden: Tensor) -> Tensor:
        """Hidden states behind the last block, [..., hidden], in the model's own basis."""
        return hidden if self.turn is None else self.turn.undo(hidden)

    def turned(
        self, name: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear of a block, the norm in front folded in, in the new basis.

        Differentiable in the rotation.
        """
        if self.turn is None:
            return weight, bias
        group = next(group for group in self.family.groups if name in group.linears)
        if group.norm is not None:
            return self.turn.apply(weight), bias
        if group.site not in (Site.ATTN_OUT, Site.MLP_OUT):
            raise ValueError(f"{name} reads {group.site.value}: no rule says what it writes to")
        return self.turn.apply_to_outputs(weight), None if bias is None else self.turn.apply(bias)

    @torch.no_grad()
    def fold_norms(self, block: nn.Module) -> None:
        """Multiply the weight of every norm into the linears behind it, in place."""
        for group in self.family.groups:
            if self.turn is None or group.norm is None:
                continue
            gamma = block.get_submodule(group.norm).get_parameter("weight")
            for name in group.linears:
                block.get_submodule(name).get_parameter("weight").mul_(gamma)
            gamma.fill_(1.0)

    @torch.no_grad()
    def rotate(self, block: nn.Module) -> None:
        """Merge the rotation into a floating-point block, in place; its norms become 1."""
        if self.turn is None:
            return
        self.fold_norms(block)
        for name, linear in self.family.get_linears(block):
            weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
            turned = self.turned(name, weight.double(), None if bias is None else bias.double())
            weight.copy_(turned[0])
            if bias is not None and turned[1] is not None:
                bias.copy_(turned[1])

    def unquantized(
        self, block: nn.Module, done: Mapping[str, Tensor], like: nn.Module
    ) -> dict[str, Tensor]:
        """Tensors of a rotated block that changed although nothing quantizes them.

        Args:
            block: the rotated block.
            done: the tensors that the block already has.
            like: the block of the model, for dtypes.
        """
        if self.turn is None:
            return {}
        names = [name for name, _ in self.family.get_linears(block)]
        names += [group.norm for group in self.family.groups if group.norm is not None]
        return {
            f"{name}.{part}": tensor.detach().to(like.get_submodule(name).get_parameter(part).dtype)
            for name in names
            if not {f"{name}.weight", f"{name}.weight_packed"} & set(done)
            for part, tensor in block.get_submodule(name).named_parameters(recurse=False)
        }

    @torch.no_grad()
    def outer(self, model: nn.Module) -> dict[str, Tensor]:
        """Embedding, last norm and head in the new basis, by their full names, on the CPU."""
        if self.turn is None:
            return {}
        turn, family = self.turn, self.family
        embedding = model.get_submodule(family.embedding).get_parameter("weight")
        norm = model.get_submodule(family.final_norm).get_parameter("weight")
        head = model.get_submodule(family.head)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{family.head} is a {type(head).__name__}, not nn.Linear")
        return {
            f"{family.embedding}.weight": _turned_rows(turn, embedding),
            f"{family.final_norm}.weight": torch.ones_like(norm).cpu(),
            f"{family.head}.weight": _turned_rows(turn, head.weight, norm),
        }


def _turned_rows(turn: Turn, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """weight·diag(scale)·R, computed in float64 where R is, in the dtype of the weight."""
    parts = []
    for part in weight.split(_ROWS):
        rows = part.to(turn.device).double()
        rows = rows if scale is None else rows * scale.to(turn.device).double()
        parts.append(turn.apply(rows).to(weight.dtype).cpu())
    return torch.cat(parts)


def start_residual(
    recipe: Recipe, family: FamilySpec, geometry: Geometry, generator: Generator
) -> Residual:
    """The rotation that a recipe asks for, at its start value.

    Raises:
        ValueError: the recipe names something that is no rotation.
    """
    kind = recipe.transforms.get(Site.RESIDUAL)
    if kind is None:
        return Residual(family, None)
    if kind not in ROTATIONS:
        raise ValueError(
            f"transforms[{Site.RESIDUAL.value!r}]={kind!r} must be a rotation, one of "
            f"{list(ROTATIONS)}: norms commute with nothing else"
        )
    return Residual(family, ROTATIONS[kind](geometry.hidden, generator))
