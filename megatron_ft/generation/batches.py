"""Which prompts are answered together: pure functions of their lengths."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Return the indices of the prompts of each batch, the shortest prompts first.

    In one batch, what a prompt is longer than the shortest one is read token by token, so a batch takes longest - shortest +
    max_new_tokens steps. A gap between two lengths that is larger than max_new_tokens begins a new batch: this gives the fewest steps.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found: list[list[int]] = []
    for i in order:
        last = found[-1] if found else []
        if not last or len(last) == batch_size or lengths[i] - lengths[last[-1]] > max_new_tokens:
            found.append([])
        found[-1].append(i)
    return found
