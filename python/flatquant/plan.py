"""What a quantized model looks like: enough to rebuild its empty modules, as plain JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatquant.models.spec import FamilySpec, Group, Site
from flatquant.scheme import Scheme

FORMAT_VERSION = 1
"""Version of the stored tensors and of this description; readers refuse a newer one."""


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """Scheme, online transforms and exceptions of a quantized model.

    Attributes:
        scheme: bit widths and grids.
        sites: sites that have a transform. ATTN_IN, MLP_IN and MLP_OUT hold both Kronecker
            factors online, ATTN_OUT the left one, QK_HEAD acts on K and Q; V_HEAD leaves no
            module behind, its matrix is merged.
        ignore: names of linears to leave alone; an entry "re:..." is a regular expression
            that must match the whole name.
        method: name of the recipe that made the model; information only.
    """

    scheme: Scheme
    sites: frozenset[Site] = field(default_factory=frozenset)
    ignore: tuple[str, ...] = ("lm_head",)
    method: str = "rtn"

    def ignores(self, name: str) -> bool:
        """Whether the linear of this full name is to be left alone."""
        return any(
            re.fullmatch(entry[3:], name) is not None if entry.startswith("re:") else entry == name
            for entry in self.ignore
        )

    def quantizes_group(self, block_name: str, group: Group) -> bool:
        """Whether the linears of a group are replaced; one ignored member excludes them all.

        A site with a transform is replaced also when no linear is quantized: that is how the
        law "transforms leave logits unchanged" is tested on the runtime's own modules.
        """
        wanted = self.scheme.quantizes_linears or group.site in self.sites
        return wanted and not any(self.ignores(f"{block_name}.{name}") for name in group.linears)

    def has(self, site: Site, block_name: str, family: FamilySpec) -> bool:
        """Whether a block has a transform at a site; merged ones need their linears replaced."""
        if site not in self.sites:
            return False
        if site is Site.QK_HEAD:
            return True
        needed = (Site.ATTN_IN, Site.ATTN_OUT) if site is Site.V_HEAD else (site,)
        return not any(
            self.ignores(f"{block_name}.{name}")
            for linear_site in needed
            for name in family.group(linear_site).linears
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "scheme": str(self.scheme),
            "sites": sorted(site.value for site in self.sites),
            "ignore": list(self.ignore),
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationPlan:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a missing or unknown key, site or scheme.
        """
        known = {"scheme", "sites", "ignore", "method"}
        if set(data) != known:
            raise ValueError(f"plan has keys {sorted(data)}, expected {sorted(known)}")
        return cls(
            scheme=Scheme.parse(data["scheme"]),
            sites=frozenset(Site(site) for site in data["sites"]),
            ignore=tuple(data["ignore"]),
            method=data["method"],
        )
