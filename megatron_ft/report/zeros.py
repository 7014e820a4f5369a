"""The zeros in the MLPs of a run by layer, at its first and its last step."""

from __future__ import annotations

from megatron_ft.report.by_length import by_length
from megatron_ft.report.metrics import Metrics

ZEROS = "Share of exact zeros at the input of the down projection in each layer, over all tokens of a step."
_BEFORE = "train/sparsity_by_layer/"


def by_layer(metrics: Metrics) -> str:
    """Return a figure; nothing if the run did not log them."""
    layers = {
        int(name.removeprefix(_BEFORE)): curve for name, curve in metrics.curves.items() if name.startswith(_BEFORE)
    }
    curves = [curve for _, curve in sorted(layers.items()) if curve]
    if not curves:
        return ""
    lines = {f"step {curves[0][at][0]:,}": [curve[at][1] for curve in curves] for at in (0, -1)}
    svg = by_length("Zeros in the MLPs by layer", range(len(curves)), lines, "layer", "zeros (percent)")
    return f'<figure style="max-width:760px">{svg}</figure>'
