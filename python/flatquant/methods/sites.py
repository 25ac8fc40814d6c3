"""Which sites a method touches under a scheme."""

from __future__ import annotations

from flatquant.models.spec import Site
from flatquant.scheme import Scheme

KRONECKER_SITES = (Site.ATTN_IN, Site.ATTN_OUT, Site.MLP_IN, Site.MLP_OUT, Site.V_HEAD)
NORM_SITES = (Site.ATTN_IN, Site.MLP_IN)
SCALED_SITES = (*NORM_SITES, Site.MLP_OUT)
LET_SITES = (Site.ATTN_IN, Site.ATTN_OUT, Site.MLP_IN)


def everywhere(scheme: Scheme, kind: str) -> dict[Site, str]:
    """The same kind of transform at every site that the scheme gives a reason for."""
    sites: tuple[Site, ...] = ()
    if scheme.quantizes_linears:
        sites += KRONECKER_SITES
    elif scheme.v_bits < 16:
        sites += (Site.V_HEAD,)
    if scheme.k_bits < 16:
        sites += (Site.QK_HEAD,)
    return {site: kind for site in sites}
