"""All methods on the same model, text and quantizer, in one table."""

from flatquant.compare.papers import PAPERS, beside, paper
from flatquant.compare.run import Comparison, Row, compare
from flatquant.compare.table import as_csv, as_json, as_text

__all__ = [
    "PAPERS",
    "Comparison",
    "Row",
    "as_csv",
    "as_json",
    "as_text",
    "beside",
    "compare",
    "paper",
]
