"""What a quantized model looks like: enough to rebuild its empty modules, as plain JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

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
            factors online, ATTN_OUT the left one, QK_HEAD acts on K and Q; V_HEAD and RESIDUAL
            leave no module behind, their matrices are merged.
        ignore: names of linears to leave alone; an entry "re:..." is a regular expression
            that must match the whole name.
        method: name of the recipe that made the model; information only.
        splits: sizes (n1, n2) of online Kronecker factors where they are not those of
            `flatquant.transforms.kronecker_split`.
        kept: (name of a block, "." and a site; number of its input channels that stay in floating
            point), where there are any.
    """

    scheme: Scheme
    sites: frozenset[Site] = field(default_factory=frozenset)
    ignore: tuple[str, ...] = ("lm_head",)
    method: str = "rtn"
    splits: Mapping[Site, tuple[int, int]] = field(default_factory=dict)
    kept: tuple[tuple[str, int], ...] = ()

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
        names = [f"{block_name}.{name}" for name in group.linears]
        wanted = group.site in self.sites or any(
            self.scheme_of(name).quantizes_linears for name in names
        )
        return wanted and not any(map(self.ignores, names))

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of one linear or attention module, by its full name."""
        return self.scheme.at(name)

    def input_scheme(self, block_name: str, group: Group) -> Scheme:
        """The scheme of the input that a group shares, which is that of its first linear.

        Raises:
            ValueError: overrides give one of the others another input.
        """
        first, *others = (self.scheme_of(f"{block_name}.{name}") for name in group.linears)
        for name, other in zip(group.linears[1:], others, strict=True):
            if other.activations != first.activations:
                raise ValueError(
                    f"scheme {self.scheme}: {block_name}.{name} and {group.linears[0]} share one "
                    "quantized input, so an override of A must cover both"
                )
        return first

    def kept_columns(self, block_name: str, site: Site) -> int:
        """How many channels of an input stay in floating point."""
        return dict(self.kept).get(f"{block_name}.{site.value}", 0)

    def keeping(
        self, block_name: str, family: FamilySpec, tensors: Mapping[str, Tensor]
    ) -> QuantizationPlan:
        """The plan with the numbers of kept channels that a finished block has."""
        counts = {
            f"{block_name}.{group.site.value}": len(tensors[f"{reader}.kept"])
            for group in family.groups
            for reader in (group.norm or group.linears[0],)
            if f"{reader}.kept" in tensors
        }
        return replace(self, kept=(*self.kept, *counts.items()))

    def has(self, site: Site, block_name: str, family: FamilySpec) -> bool:
        """Whether a block has a transform at a site; merged ones need their linears replaced."""
        if site not in self.sites:
            return False
        if site in (Site.RESIDUAL, Site.QK_HEAD):
            return True
        needed = (Site.ATTN_IN, Site.ATTN_OUT) if site is Site.V_HEAD else (site,)
        return not any(
            self.ignores(f"{block_name}.{name}")
            for linear_site in needed
            for name in family.group(linear_site).linears
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        extra: dict[str, Any] = {}
        if self.splits:
            extra["splits"] = {site.value: list(sizes) for site, sizes in self.splits.items()}
        if self.kept:
            extra["kept"] = [list(pair) for pair in self.kept]
        return {
            **extra,
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
        if set(data) - {"kept", "splits"} != known:
            raise ValueError(f"plan has keys {sorted(data)}, expected {sorted(known)}")
        return cls(
            scheme=Scheme.parse(data["scheme"]),
            sites=frozenset(Site(site) for site in data["sites"]),
            ignore=tuple(data["ignore"]),
            method=data["method"],
            splits={
                Site(site): (int(left), int(right))
                for site, (left, right) in data.get("splits", {}).items()
            },
            kept=tuple((str(name), int(count)) for name, count in data.get("kept", ())),
        )
