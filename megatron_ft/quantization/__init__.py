"""Weights in 4 bits (NF4): codes and back, slices, and the engine's linears over them. See docs/quantization.md."""
