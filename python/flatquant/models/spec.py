"""A model family as data: what shares an input, what produces it, where heads are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn


class Site(str, Enum):
    """Where a change of basis sits in a decoder block (FlatQuant, section 3.2).

    ======== ===================== ============================ =======================
    site     transforms            online                       inverse goes to
    ======== ===================== ============================ =======================
    RESIDUAL the residual stream   no: merged in the embedding, W_q, W_k, W_v, W_gate,
                                   W_o and W_down (R1)          W_up and the head
    ATTN_IN  output of input norm  P_a, Kronecker               W_q, W_k, W_v
    QK_HEAD  K and Q after RoPE    P_h on K, its inverse on Q   cancels in q·k
    V_HEAD   output of v_proj      no: merged in W_v (P_v)      W_o, right factor
    ATTN_OUT heads, before o_proj  P_o, left factor only        W_o, left factor
    MLP_IN   output of second norm P_ug, Kronecker              W_gate, W_up
    MLP_OUT  silu(gate)·up         P_d, Kronecker               W_down
    ======== ===================== ============================ =======================

    RESIDUAL belongs to the whole model and must be orthogonal, or the norms would not commute
    with it (QuaRot, arXiv 2404.00456, section 4).
    """

    RESIDUAL = "residual"
    ATTN_IN = "attn_in"
    QK_HEAD = "qk_head"
    V_HEAD = "v_head"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"


LINEAR_SITES = (Site.ATTN_IN, Site.ATTN_OUT, Site.MLP_IN, Site.MLP_OUT)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of one block that read the same input and so share one transform and one clip.

    Attributes:
        site: where the group's input is.
        linears: names relative to the block, in the order of the forward pass.
        norm: the RMSNorm that produces the input; None: the linear transforms its own input.
        scaled_by: linear whose output rows can absorb a per-channel scale of this input.
    """

    site: Site
    linears: tuple[str, ...]
    norm: str | None = None
    scaled_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one decoder block, read from the model's config."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def width(self, site: Site) -> int:
        """Number of channels at a site; of one head at QK_HEAD and V_HEAD."""
        if site in (Site.RESIDUAL, Site.ATTN_IN, Site.MLP_IN):
            return self.hidden
        if site is Site.ATTN_OUT:
            return self.heads * self.head_dim
        if site is Site.MLP_OUT:
            return self.intermediate
        return self.head_dim


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Everything the methods need to know about a model family.

    Attributes:
        name: the family, as in ``config.model_type``.
        decoder: module that maps token ids to the last hidden state, relative to the model.
        blocks: list of decoder blocks, relative to the model.
        attention: the attention module, relative to a block.
        mlp: the gated MLP, relative to a block.
        groups: the linears, by the input they share.
        query, key, value: the projections, relative to a block.
        embedding, final_norm, head: what surrounds the blocks, relative to the model.
        query_norm, key_norm: norms of every head's queries and keys before RoPE, if any.
    """

    name: str
    decoder: str = "model"
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    groups: tuple[Group, ...] = ()
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    query_norm: str | None = None
    key_norm: str | None = None

    def group(self, site: Site) -> Group:
        """The group of linears that reads the input at `site`."""
        for group in self.groups:
            if group.site is site:
                return group
        raise KeyError(f"family {self.name!r} has no group at {site.value}")

    def get_blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks of `model`."""
        blocks = model.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"{self.blocks} is a {type(blocks).__name__}, not a ModuleList")
        return blocks

    def get_linears(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every linear of a block, in the order of the forward pass."""
        for group in self.groups:
            for name in group.linears:
                yield name, block.get_submodule(name)

    def geometry(self, config: Any) -> Geometry:
        """Sizes of a block.

        Raises:
            ValueError: sizes that contradict each other.
        """
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            if config.hidden_size % heads:
                raise ValueError(
                    f"hidden_size={config.hidden_size} is not divisible by "
                    f"num_attention_heads={heads}, and the config names no head_dim"
                )
            head_dim = config.hidden_size // heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}"
            )
        return Geometry(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )


def norm_epsilon(norm: nn.Module) -> float:
    """The ε of an RMSNorm module."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if value is not None:
            return float(value)
    raise TypeError(f"{type(norm).__name__} has no variance_epsilon or eps: not an RMSNorm")


def check_weights(block: nn.Module, spec: FamilySpec, where: str) -> None:
    """Refuse a block whose linears hold NaN or Inf.

    Raises:
        ValueError: naming the tensor and how many of its values are not finite.
    """
    for name, linear in spec.get_linears(block):
        for part, tensor in linear.named_parameters(recurse=False):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(
                    f"{where}.{name}.{part}: {bad} of {tensor.numel()} values are NaN or Inf; "
                    "a model must be finite before it is quantized"
                )
