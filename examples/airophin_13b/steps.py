"""Print the number of optimizer steps in which every packed row of some shards is used a number of times.

python steps.py PREFIX SEQ_LENGTH GLOBAL_BATCH_SIZE EPOCHS
"""

import math
import sys

import numpy as np

from megatron_ft.data.packing import best_fit, positions
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import UserError


def steps(prefix: str, seq_length: int, global_batch_size: int, epochs: float) -> int:
    """Return the steps for `epochs` passes through the samples of a prefix. Raise DataError if there are no shards."""
    sizes = positions(open_shards(prefix).lengths, seq_length)
    rows = len(best_fit(np.arange(len(sizes)), sizes, seq_length).starts) - 1
    return math.ceil(epochs * rows / global_batch_size)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        print(steps(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    except UserError as error:
        print(f"steps.py: {error}", file=sys.stderr)
        sys.exit(2)
