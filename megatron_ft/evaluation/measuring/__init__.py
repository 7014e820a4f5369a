"""Peak memory and time of generation with a model in 32, 16, 8 or 4 bits: `megatron-ft measure`."""
