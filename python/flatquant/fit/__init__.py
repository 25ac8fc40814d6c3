"""How free numbers are found."""

from flatquant.fit.block import FitDivergedError, FitLog, fit_block

__all__ = ["FitDivergedError", "FitLog", "fit_block"]
