"""Decoding on a CPU that reads only the rows of the MLP whose activations are not zero, in models with ReLU."""
