"""The run report: one HTML file that contains its figures and needs no other resource.

It is made from metrics.jsonl and from sections that a command adds, without training code or models.
"""

from megatron_ft.report.metrics import Metrics, read_metrics
from megatron_ft.report.page import Page

__all__ = ["Metrics", "Page", "read_metrics"]
