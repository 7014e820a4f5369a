"""Logs at the start of a run which kernels are used, in the log file, and which flags have no effect on this machine."""

from __future__ import annotations

from megatron_ft.config.sections import Kernels
from megatron_ft.log import ONLY_IN_FILE, logger
from megatron_ft.models.kernels import Choice

log = logger("finetune")


def report_kernels(kernels: Kernels, choice: Choice, has_gpu: bool) -> None:
    """Log once what computes what, and which flags do nothing here. An option that is ignored in silence is a trap."""
    log.info("kernels: " + "; ".join(f"{what} by {how}" for what, how in choice.lines()), extra=ONLY_IN_FILE)
    for reason in choice.reasons:
        log.warning(reason)
    if kernels.overlap_p2p_communication and not has_gpu:
        log.warning("--overlap_p2p_communication: this machine has no GPU, so it is not used")
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(kernels, name) and not has_gpu:
            log.warning(
                f"--{name}: this machine has no GPU, so there is nothing to overlap with; the results are the same"
            )
    if kernels.tp_comm_overlap:
        log.warning(
            "--tp_comm_overlap: needs Transformer Engine's linear layers, which are not used here; it has no effect"
        )
