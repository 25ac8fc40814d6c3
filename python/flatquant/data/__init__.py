"""Calibration data: where texts come from, and how samples are made of them."""

from flatquant.data.documents import Documents, read_documents
from flatquant.data.preprocess import (
    PREPROCESSINGS,
    Task,
    calibration_samples,
    calibration_tokens,
)
from flatquant.data.tasks import SUITES, Suite

__all__ = [
    "PREPROCESSINGS",
    "SUITES",
    "Documents",
    "Suite",
    "Task",
    "calibration_samples",
    "calibration_tokens",
    "read_documents",
]
