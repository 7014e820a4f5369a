"""The run report: one HTML file, pictures inside it, nothing fetched from anywhere.

Made from metrics.jsonl and from sections that a command adds; knows nothing of training or models.
"""

from megatron_ft.report.metrics import Metrics, read_metrics
from megatron_ft.report.page import Page

__all__ = ["Metrics", "Page", "read_metrics"]
