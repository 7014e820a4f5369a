"""Sizes of NF4, without torch."""

BLOCK = 64
"""Neighbours in a row that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation."""


def nested_size(scales: int) -> int:
    """Return the numbers of the second level of a matrix with so many scales: one for each block, and the mean."""
    return -(-scales // NESTED_BLOCK) + 1


def bits_in_memory() -> float:
    """Return the bits of a weight on a rank: its code and its share of an fp32 scale."""
    return 4 + 32 / BLOCK


def bytes_on_disk(matrices: list[tuple[int, int]], double_quant: bool) -> int:
    """Return the bytes of quantised matrices [rows, columns] in a checkpoint."""
    weights = [rows * columns for rows, columns in matrices]
    if not double_quant:
        return sum(count // 2 + 4 * count // BLOCK for count in weights)
    return sum(count // 2 + count // BLOCK + 4 * nested_size(count // BLOCK) for count in weights)
