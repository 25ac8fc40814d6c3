"""The only file that replaces modules of a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flatquant.models import family_of
from flatquant.models.spec import FamilySpec, Geometry, Site
from flatquant.plan import QuantizationPlan
from flatquant.runtime import stack
from flatquant.runtime.activation import ActivationSpec
from flatquant.runtime.attention import KVQuantizer, activate
from flatquant.runtime.head import install_head
from flatquant.runtime.linear import QuantizedLinear
from flatquant.runtime.mlp import QuantizedMLP
from flatquant.runtime.norm import QuantizedNorm
from flatquant.scheme import OFF
from flatquant.transforms import kronecker_split


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `root.name` is; `name` may be dotted."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


@contextmanager
def swapped(root: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """`root` with some of its modules replaced for as long as the context lasts."""
    before = {name: root.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(root, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(root, name, module)


def block_names(model: nn.Module, family: FamilySpec) -> list[str]:
    """Full names of the decoder blocks, "model.layers.0" and so on."""
    return [f"{family.blocks}.{index}" for index in range(len(family.get_blocks(model)))]


def install(model: nn.Module, plan: QuantizationPlan) -> None:
    """Replace what the plan names by empty runtime modules, in place.

    Buffers take the device of what they replace (meta stays meta) and hold no values yet: a
    state dict must be loaded next. The model gets an attribute `flatquant_plan`.

    Raises:
        ValueError: the family is unknown, or the model is quantized already.
    """
    if getattr(model, "flatquant_plan", None) is not None:
        raise ValueError("install: the model is quantized already; load the original again")
    family = family_of(model.config)
    geometry = family.geometry(model.config)
    for name in block_names(model, family):
        install_block(model.get_submodule(name), name, family, geometry, plan)
    if plan.scheme.head_bits != OFF:
        install_head(model, plan.scheme.head_bits)
    model.flatquant_plan = plan  # type: ignore[assignment]
    if plan.scheme.quantizes_cache or Site.QK_HEAD in plan.sites:
        activate(model)
        stack.activate(model)


def install_block(
    block: nn.Module, name: str, family: FamilySpec, geometry: Geometry, plan: QuantizationPlan
) -> None:
    """Replace what the plan names in one block by empty runtime modules, in place."""
    for group in family.groups:
        if not plan.quantizes_group(name, group):
            continue
        sizes = _factor_sizes(group.site, geometry, plan)
        schemes = [plan.scheme_of(f"{name}.{linear_name}") for linear_name in group.linears]
        inputs = plan.input_scheme(name, group).activations
        spec = ActivationSpec(
            width=geometry.width(group.site),
            bits=inputs.bits,
            symmetric=inputs.symmetric,
            left=sizes[0],
            right=sizes[1],
            wide_weights=any(4 < scheme.w_bits < OFF for scheme in schemes),
            simulated=None if inputs.off or inputs.by_row else inputs,
            kept=plan.kept_columns(name, group.site),
        )
        for linear_name, scheme in zip(group.linears, schemes, strict=True):
            linear = block.get_submodule(linear_name)
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name}.{linear_name} is a {type(linear).__name__}, not nn.Linear")
            online = group.norm is None
            replace_module(
                block, linear_name, QuantizedLinear.empty_like(linear, scheme, spec, online=online)
            )
        if group.norm is not None:
            norm = block.get_submodule(group.norm)
            replace_module(block, group.norm, QuantizedNorm.empty_like(norm, spec))
    _install_mlp(block, name, family, plan)
    cache = plan.scheme_of(f"{name}.{family.attention}")
    if cache.quantizes_cache or Site.QK_HEAD in plan.sites:
        attention = block.get_submodule(family.attention)
        device = next(itertools.chain(block.parameters(), block.buffers())).device
        quantizer = KVQuantizer(
            geometry.head_dim,
            cache.k_bits,
            cache.v_bits,
            transform=Site.QK_HEAD in plan.sites,
            k_format=None if cache.keys.off or cache.keys.by_row else cache.keys,
            v_format=None if cache.values.off or cache.values.by_row else cache.values,
        )
        attention.add_module("kv_quantizer", quantizer.to(device))


def _install_mlp(block: nn.Module, name: str, family: FamilySpec, plan: QuantizationPlan) -> None:
    """Replace the MLP's forward where both of its groups are quantized, to fuse SiLU·mul."""
    if all(plan.quantizes_group(name, family.group(s)) for s in (Site.MLP_IN, Site.MLP_OUT)):
        mlp = block.get_submodule(family.mlp)
        replace_module(block, family.mlp, QuantizedMLP.from_module(mlp))


def _factor_sizes(site: Site, geometry: Geometry, plan: QuantizationPlan) -> tuple[int, int]:
    """(n1, n2) of the online transform; 0 is a missing factor."""
    if site not in plan.sites:
        return 0, 0
    if site in plan.splits:
        return plan.splits[site]
    if site is Site.ATTN_OUT:
        return geometry.heads, 0
    return kronecker_split(geometry.width(site))


@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """The same quantized model, its linears simulated in floating point.

    Transforms and quantizers are the runtime's own; the integer products are computed in
    float64 (exactly) and scaled by the same expression, so that in float32 on a CPU the logits
    equal the integer kernels' bit for bit (docs/numerics.md, law 2).

    Raises:
        ValueError: the model is not quantized.
    """
    if getattr(model, "flatquant_plan", None) is None:
        raise ValueError("fake_quantized: the model is not quantized (no flatquant_plan)")
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for linear in linears:
        linear.simulate = True
    try:
        with torch.no_grad():
            yield model
    finally:
        for linear in linears:
            linear.simulate = False
