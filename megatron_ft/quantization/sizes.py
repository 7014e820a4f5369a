"""Sizes of NF4, without torch."""

BLOCK = 64
"""Neighbours in a row that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation."""


def nested_size(scales: int) -> int:
    """Return the numbers of the second level of a matrix with so many scales: one for each block, and the mean."""
    return -(-scales // NESTED_BLOCK) + 1
