"""The two sizes that recur in every command that cuts a model or runs a cut one. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelParallel:
    """How the model is cut"""

    tensor_model_parallel_size: int = 1
    """Parts each matrix is cut into (TP)."""
    pipeline_model_parallel_size: int = 1
    """Groups of layers, one after another (PP)."""
