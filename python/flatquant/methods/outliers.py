"""Methods that keep outlier columns of inputs and weights in floating point."""

from __future__ import annotations

from flatquant.outliers import Outliers
from flatquant.recipe import Recipe
from flatquant.scheme import Scheme
from flatquant.weights import Gptq, MseClip


def llm_int8(scheme: Scheme) -> Recipe:
    """LLM.int8() (arXiv 2208.07339): columns in which |x| reaches 6; meant for W8A8."""
    return Recipe(
        method="llm_int8", scheme=scheme, outliers=Outliers(by="largest", share=1.0, threshold=6.0)
    )


def quik(scheme: Scheme) -> Recipe:
    """QUIK (arXiv 2310.09259): the 256 of 4096 columns with the largest |x|; GPTQ with clips.

    The paper's scheme is W4A4-asym-down_proj:8.
    """
    return Recipe(
        method="quik",
        scheme=scheme,
        outliers=Outliers(by="largest", share=1 / 16),
        weights=Gptq(clip=MseClip()),
    )


def owq(scheme: Scheme) -> Recipe:
    """OWQ (arXiv 2306.02272): the columns that rounding costs most, weights only; then GPTQ."""
    return Recipe(
        method="owq",
        scheme=scheme,
        outliers=Outliers(by="sensitive", share=0.01),
        weights=Gptq(clip=MseClip()),
    )
