"""megatron_ft: fine-tune language models on many GPUs with megatron-core, and test all of it on a laptop.

This file imports nothing, so that `megatron-ft --help` and the converters need not import torch.
"""

__version__ = "0.1.0"
