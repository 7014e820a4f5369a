"""Run a command's work in every process of a layout, and start these processes where nothing else has started them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_ft.commands.layout_choice import LAYOUT_FLAGS, Asked, GenerationLayout, sizes_for
from megatron_ft.config.sections import Processes

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout

__all__ = ["LAYOUT_FLAGS", "Asked", "GenerationLayout", "in_layout"]


def in_layout(
    work: Callable[[Layout], None], models: Sequence[Asked], parallel: GenerationLayout, processes: Processes,
    reads_input: bool = False, together: bool = False,
) -> int:  # fmt: skip
    """Call work(layout) in every process of the layout. Return the exit code; the launcher itself does no work.

    reads_input: the first process reads this one's standard input, and the others wait for it as long as it takes.
    together: all models are in memory at once, else one after the other.
    """
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.places import is_rank, join_srun
    from megatron_ft.launch.run import launch, planned

    join_srun(processes)
    tensor, pipeline = sizes_for(models, parallel, processes, together)
    if processes.nproc_per_node is None and tensor * pipeline > 1 and not is_rank():
        processes = replace(processes, nproc_per_node=tensor * pipeline)
    if starts := planned(processes):
        code = launch(starts, processes.log_dir, prepare_engine, reads_input)
        if code is not None:
            return code  # the ranks have done what follows
        tensor, pipeline = sizes_for(models, parallel, processes, together)  # this is a rank now
    with process_groups(ParallelSizes(tensor, pipeline)) as layout:
        work(layout)
    return 0
