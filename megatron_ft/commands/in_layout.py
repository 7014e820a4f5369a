"""Run a command's work in every process of a layout, and start these processes where nothing else has started them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_ft.config.model_parallel import ModelParallel
from megatron_ft.config.sections import Processes

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout


@dataclass(frozen=True)
class GenerationLayout(ModelParallel):
    """Parallel layout of the model; the remaining processes divide the prompts among them"""


def in_layout(work: Callable[[Layout], None], parallel: GenerationLayout, processes: Processes) -> int:
    """Call work(layout) in every process of the layout. Return the exit code; the launcher itself does no work."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.places import join_srun
    from megatron_ft.launch.run import launch, planned

    join_srun(processes)
    processes = enough_for(parallel, processes)
    if (starts := planned(processes)) and (code := launch(starts, processes.log_dir, prepare_engine)) is not None:
        return code  # the ranks have done what follows
    sizes = ParallelSizes(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    with process_groups(sizes) as layout:
        work(layout)
    return 0


def enough_for(parallel: GenerationLayout, processes: Processes) -> Processes:
    """Return the processes to start: those of the layout, if their number is not given and no launcher has started this one."""
    from megatron_ft.launch.places import is_rank

    needed = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if processes.nproc_per_node is None and needed > 1 and not is_rank():
        return replace(processes, nproc_per_node=needed)
    return processes
