"""A run or a comparison as one HTML file that needs nothing else. Reads files, never models."""

from irl_align.evaluation.report.write import write_report

__all__ = ["write_report"]
