"""megatron-core, imported once and made ready for this process's device."""

from __future__ import annotations

import functools
import os
import warnings

from megatron_ft.device import has_gpu
from megatron_ft.engine import patches
from megatron_ft.engine.cpu_stand_in import answer_for_cpu
from megatron_ft.errors import ConfigError

SUPPORTED = "0.16."
"""megatron-core releases on whose internals this package was checked."""


@functools.cache
def prepare_engine() -> None:
    """Import megatron-core once, on the CPU through the stand-in. Call before any other import of megatron.core.

    Raise ConfigError when the installed megatron-core is of a release this package was not checked against.
    """
    # torch's C++ warns of every connection that another process's end closes, with its own stack. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.inference.contexts.static_context
        import megatron.core.models.gpt
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules

    version = megatron.core.__version__
    if not version.startswith(SUPPORTED):
        raise ConfigError(
            f"megatron-core {version} is installed, but megatron_ft was checked against {SUPPORTED}x: "
            f"pip install 'megatron-core>=0.16,<0.17'"
        )
    patches.apply()
    if not has_gpu():
        answer_for_cpu()
