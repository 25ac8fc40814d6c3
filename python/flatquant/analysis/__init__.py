"""What quantization has done to a model, layer by layer, as tables that a report can draw."""

from flatquant.analysis.run import Analysis, Settings, analyze
from flatquant.analysis.tables import TABLES

__all__ = ["TABLES", "Analysis", "Settings", "analyze"]
