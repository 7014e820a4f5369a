"""megatron_ft: fine-tune language models on many GPUs with megatron-core, and try all of it on a laptop.

This file imports nothing: `megatron-ft --help` and the converters must not pay for torch.
"""

__version__ = "0.1.0"
