"""Methods that mix channels by orthogonal matrices."""

from __future__ import annotations

from dataclasses import replace

from flatquant.clips import Clips
from flatquant.methods.sites import everywhere
from flatquant.models.spec import Site
from flatquant.recipe import EndToEnd, Recipe, ScaleConfig
from flatquant.scheme import Scheme
from flatquant.weights import Gptq, Ldlq, MseClip


def hadamard(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of Hadamard matrices at FlatQuant's sites; no data."""
    return Recipe(method="hadamard", scheme=scheme, transforms=everywhere(scheme, "hadamard"))


def random(scheme: Scheme) -> Recipe:
    """Fixed Kronecker products of random orthogonal matrices; no data."""
    return Recipe(method="random", scheme=scheme, transforms=everywhere(scheme, "random"))


def quarot(scheme: Scheme) -> Recipe:
    """QuaRot (arXiv 2404.00456) with round-to-nearest weights; no data.

    R1 is a randomised Hadamard matrix, merged; Hadamard matrices turn values (merged), attention
    outputs across heads, queries and keys, and the input of down_proj. Clips are the paper's
    (section 5): 0.9 for activations, 0.95 for keys and values, a search over squared errors for
    weights.
    """
    transforms: dict[Site, str] = {}
    if scheme.quantizes_linears:
        transforms = dict.fromkeys((Site.V_HEAD, Site.ATTN_OUT), "hadamard")
        transforms[Site.MLP_OUT] = "whole-hadamard"
        transforms[Site.RESIDUAL] = "randomised-hadamard"
    elif scheme.v_bits < 16:
        transforms = {Site.V_HEAD: "hadamard"}
    if scheme.k_bits < 16:
        transforms[Site.QK_HEAD] = "hadamard"
    return Recipe(
        method="quarot",
        scheme=scheme,
        transforms=transforms,
        clips=Clips(activations=0.9, keys=0.95, values=0.95),
        weights="rtn-mse",
    )


def quarot_gptq(scheme: Scheme) -> Recipe:
    """QuaRot with GPTQ on the same searched grids, columns in their own order."""
    weights = Gptq(act_order=False, clip=MseClip())
    return replace(quarot(scheme), method="quarot-gptq", weights=weights)


def spinquant(scheme: Scheme) -> Recipe:
    """SpinQuant (arXiv 2405.16406) with round-to-nearest weights.

    R1 (residual stream) and R2 (values, per layer) start as randomised Hadamard matrices and are
    learned; R3 (queries and keys) and R4 (input of down_proj) are fixed and online. Clips are
    those of the authors' scripts: 0.95 for keys and values, a search for weights.
    """
    recipe = spinquant_nohad(scheme)
    online = {Site.MLP_OUT: "whole-hadamard"} if scheme.quantizes_linears else {}
    if scheme.k_bits < 16:
        online[Site.QK_HEAD] = "hadamard"
    return replace(recipe, method="spinquant", transforms={**recipe.transforms, **online})


def spinquant_nohad(scheme: Scheme) -> Recipe:
    """SpinQuant without online rotations: everything it changes is merged."""
    sites: tuple[Site, ...] = ()
    if scheme.quantizes_linears:
        sites = (Site.RESIDUAL, Site.V_HEAD)
    elif scheme.v_bits < 16:
        sites = (Site.V_HEAD,)
    return Recipe(
        method="spinquant-nohad",
        scheme=scheme,
        transforms=dict.fromkeys(sites, "randomised-hadamard"),
        clips=Clips(keys=0.95, values=0.95),
        end_to_end=EndToEnd(),
        weights="rtn-mse",
    )


def spinquant_gptq(scheme: Scheme) -> Recipe:
    """SpinQuant with GPTQ: rotations are learned while only activations and cache are rounded."""
    only_weights = not (scheme.quantizes_activations or scheme.quantizes_cache)
    return replace(
        spinquant(scheme),
        method="spinquant-gptq",
        end_to_end=EndToEnd(round_weights=only_weights),
        weights=Gptq(act_order=False, clip=MseClip()),
    )


def quip(scheme: Scheme) -> Recipe:
    """QuIP (arXiv 2307.13304): incoherent weights and Hessians, then LDLQ.

    Both sides of a weight are multiplied by Kronecker products of random orthogonal matrices
    (section 4.1) where the output side can be merged, which is at the residual stream and the
    values; the input side everywhere. Channels are rescaled by (diag H / diag WᵀW)^¼ (its
    algorithm 1) where that is not already mixed: in front of o_proj and down_proj.
    """
    transforms: dict[Site, str] = {}
    scales: dict[Site, ScaleConfig] = {}
    if scheme.quantizes_linears:
        sites = (Site.RESIDUAL, Site.V_HEAD, Site.ATTN_OUT, Site.MLP_OUT)
        transforms = dict.fromkeys(sites, "random")
        rescaled = ScaleConfig(start="alignment", learned=False)
        scales = dict.fromkeys((Site.ATTN_OUT, Site.MLP_OUT), rescaled)
    elif scheme.v_bits < 16:
        transforms = {Site.V_HEAD: "random"}
    if scheme.k_bits < 16:
        transforms[Site.QK_HEAD] = "random"
    return Recipe(
        method="quip",
        scheme=scheme,
        transforms=transforms,
        scales=scales,
        weights=Ldlq(clip=MseClip()),
    )
