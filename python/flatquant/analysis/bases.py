"""In which bases a quantized block works, read off its stored tensors.

A method merges what it can: per-channel scales into norms and rows, P_v into two projections, a
rotation of the residual stream into nearly everything. To say what rounding has done to a weight,
and what quantization to an output, the floating-point one must be brought into the same basis:

    W' = rows · W · diag(g / g') · R · (P1 ⊗ P2)^-T

g, g' are the norms' weights (both are stored), R the rotation of the residual stream (embedding =
E·R, unquantized, so R is exact), P1 and P2 the online factors (stored). What is merged in rows is
not stored: P_v and the scales of values, keys and the MLP's product are recovered by least squares
from the weights themselves, and only where they explain most of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.models.spec import FamilySpec, Geometry, Group, Site
from flatquant.runtime.activation import InputQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.runtime.norm import QuantizedNorm
from flatquant.transforms.base import kronecker_product

_RESIDUAL_TOLERANCE = 0.05
"""Share of the embedding that R may leave unexplained: an 8-bit embedding differs by 0.01."""
_EXPLAINS = 0.5
"""A basis is taken for merged if it removes more than this share of the squared difference."""


@torch.no_grad()
def residual_rotation(fp: Any, quantized: Any) -> Tensor | None:
    """R [hidden, hidden] float32 with embedding' = embedding·R; None where they are equal.

    The orthogonal matrix that fits best (Procrustes): norms let no other pass.

    Raises:
        ValueError: no rotation maps one embedding to the other.
    """
    ours, theirs = fp.get_input_embeddings(), quantized.get_input_embeddings()
    count = int(ours.num_embeddings)
    step = max(count // (8 * int(ours.embedding_dim)), 1)
    ids = torch.arange(0, count, step, device=ours.weight.device)
    a, b = ours(ids).double(), theirs(ids.to(next(quantized.parameters()).device)).double()
    b = b.to(a.device)
    if a.shape != b.shape:
        raise ValueError(f"the models have embeddings of {a.shape[1]} and {b.shape[1]} channels")
    size = float(a.norm())
    if float((a - b).norm()) <= _RESIDUAL_TOLERANCE * size:
        return None
    left, _, right = torch.linalg.svd(a.mT @ b)
    rotation = left @ right
    rest = float((a @ rotation - b).norm()) / size
    if rest > _RESIDUAL_TOLERANCE:
        raise ValueError(
            f"the best rotation of one model's embedding into the other's leaves {rest:.0%} of it: "
            "the quantized model was made from another one"
        )
    return rotation.float()


@dataclass(frozen=True, kw_only=True)
class OutputBasis:
    """How an output of the floating-point block becomes one of the quantized block.

    Attributes:
        rotation: of the residual stream, for what is added to it.
        gain: per output channel, or None.
        heads: P per key-value head [heads, d, d], for v_proj, or None.
    """

    rotation: Tensor | None = None
    gain: Tensor | None = None
    heads: Tensor | None = None

    def apply(self, y: Tensor) -> Tensor:
        """y: [..., out]."""
        if self.rotation is not None:
            y = y @ self.rotation.to(y.dtype)
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        if self.heads is not None:
            split = y.reshape(*y.shape[:-1], *self.heads.shape[:2])
            y = torch.einsum("...hd,hde->...he", split, self.heads.to(y.dtype)).reshape(y.shape)
        return y


@dataclass(frozen=True, kw_only=True)
class LinearBasis:
    """A linear of both models in the quantized model's bases.

    Attributes:
        weight: the weight before rounding, float32 [out, in].
        stored: the weight that the quantized model multiplies by, float32 [out, in].
        output: how to compare outputs.
    """

    weight: Tensor
    stored: Tensor
    output: OutputBasis


def stored_weight(linear: nn.Module) -> Tensor:
    """float32 [out, in], dequantized where it is codes."""
    if isinstance(linear, QuantizedLinear):
        return linear.dequantized_weight(torch.float32)
    return linear.get_parameter("weight").detach().float()


def owner_of(block: nn.Module, group: Group) -> nn.Module:
    """The module that holds the online transform of a group's input."""
    return block.get_submodule(group.norm if group.norm is not None else group.linears[0])


@torch.no_grad()
def linear_bases(
    fp_block: nn.Module,
    block: nn.Module,
    family: FamilySpec,
    geometry: Geometry,
    rotation: Tensor | None,
) -> dict[str, LinearBasis]:
    """Every linear of a block, by its name relative to the block, in forward order."""
    found: dict[str, LinearBasis] = {}
    for group in family.groups:
        owner = owner_of(block, group)
        for name in group.linears:
            weight = fp_block.get_parameter(f"{name}.weight").detach().float()
            weight = _input_basis(weight, group, fp_block, owner, geometry, rotation, found, family)
            adds = group.site in (Site.ATTN_OUT, Site.MLP_OUT)
            output = OutputBasis(rotation=rotation if adds else None)
            if output.rotation is not None:
                weight = output.rotation.mT @ weight
            stored = stored_weight(block.get_submodule(name)).to(weight.device)
            fitted = _fitted(weight, stored, geometry if name == family.value else None)
            weight = fitted.apply(weight.mT).mT
            output = OutputBasis(rotation=output.rotation, gain=fitted.gain, heads=fitted.heads)
            found[name] = LinearBasis(weight=weight, stored=stored, output=output)
    return found


def _input_basis(
    weight: Tensor,
    group: Group,
    fp_block: nn.Module,
    owner: nn.Module,
    geometry: Geometry,
    rotation: Tensor | None,
    found: dict[str, LinearBasis],
    family: FamilySpec,
) -> Tensor:
    """The weight for the input as the quantized block prepares it."""
    if group.norm is not None:
        before = fp_block.get_submodule(group.norm).get_parameter("weight").detach().float()
        after = getattr(owner, "weight", None)
        assert isinstance(after, Tensor)
        weight = weight * before
        weight = weight if rotation is None else weight @ rotation
        weight = weight / torch.where(after == 0, 1.0, after.float())
    elif group.site is Site.ATTN_OUT:
        heads = found[family.value].output.heads
        if heads is not None:
            inverse = heads.double().inverse().mT.float()
            inverse = inverse.repeat_interleave(geometry.heads // geometry.kv_heads, dim=0)
            split = weight.reshape(weight.shape[0], *inverse.shape[:2])
            weight = torch.einsum("ohd,hde->ohe", split, inverse).reshape(weight.shape)
    elif group.scaled_by is not None:
        gain = found[group.scaled_by].output.gain
        weight = weight if gain is None else weight / gain
    return inverse_transposed(owner, weight)


def factors_of(owner: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """P1 and P2 of an online transform, float64; None is a missing factor."""
    if not isinstance(owner, InputQuantizer):
        return None, None
    left, right = owner.left_trans, owner.right_trans
    return None if left is None else left.double().mT, None if right is None else right.double()


def inverse_transposed(owner: nn.Module, weight: Tensor) -> Tensor:
    """w·(P1 ⊗ P2)^-T along the last dimension."""
    inverses = [None if f is None else f.inverse().mT.float() for f in factors_of(owner)]
    return kronecker_product(weight, *inverses)


def _fitted(weight: Tensor, stored: Tensor, values: Geometry | None) -> OutputBasis:
    """What is merged in the rows: a gain, or a matrix a head of the values; empty for nothing."""
    if values is None:
        gain = (stored * weight).sum(1) / weight.square().sum(1).clamp_min(1e-30)
        found = OutputBasis(gain=torch.where(gain == 0, 1.0, gain))
    else:
        shape = (values.kv_heads, values.head_dim, weight.shape[1])
        ours, theirs = weight.reshape(shape).mT.double(), stored.reshape(shape).mT.double()
        found = OutputBasis(heads=torch.linalg.lstsq(ours, theirs).solution.float())
    before = float((stored - weight).square().sum())
    after = float((stored - found.apply(weight.mT).mT).square().sum())
    return found if after < (1 - _EXPLAINS) * before else OutputBasis()


@torch.no_grad()
def prepared_input(owner: nn.Module, seen: Tensor) -> Tensor:
    """A group's input in the transformed basis, before it is quantized, [..., width].

    Args:
        owner: of the group's transform, in a block of the quantized model.
        seen: what a `QuantizedNorm` is called with, or the input of the group's linears.
    """
    if isinstance(owner, QuantizedNorm):
        wide = seen.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + owner.eps)
        return owner.transform(wide * owner.weight.float())
    return owner.transform(seen) if isinstance(owner, InputQuantizer) else seen
