"""Imports megatron-core once and prepares it for the device of this process."""

from __future__ import annotations

import functools
import os
import warnings

from megatron_ft.collector import no_collection
from megatron_ft.device import has_gpu
from megatron_ft.engine import cpu_stand_in, patches
from megatron_ft.engine.versions import check_version


@functools.cache
def prepare_engine() -> None:
    """Import megatron-core once, on the CPU through the stand-in. Call before any other import of megatron.core.

    Raise EngineError when the installed megatron-core is of a release this package was not tried with, or lacks what it changes.
    """
    # torch's C++ code warns with a stack about every connection that closes when another process ends. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not has_gpu():
        cpu_stand_in.do_without_triton()
    with warnings.catch_warnings(), no_collection():
        warnings.simplefilter("ignore")
        import megatron.core
        import megatron.core.dist_checkpointing.strategies.async_utils
        import megatron.core.dist_checkpointing.strategies.state_dict_saver  # 0.19 imports both at a save, too late for the stand-in
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.inference.contexts.static_context
        import megatron.core.models.gpt
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules

    check_version(megatron.core.__version__)
    patches.apply()
    if not has_gpu():
        cpu_stand_in.apply()
