"""What megatron-core 0.16 imports of Transformer Engine 2 where no fp8 is asked for; FusedAdam computes, layers are names only."""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.4.0"
