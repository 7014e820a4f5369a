"""The two model-parallel sizes, a section of all commands that split a model or run a split one. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelParallel:
    """Parallel layout of the model"""

    tensor_model_parallel_size: int = 1
    """Number of parts that each weight matrix is split into (TP)."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that the layers are divided over (PP)."""
