"""The output of the pretokenizer at its end: one line per split, and one chat in which the trained text is marked.

The chat is decoded from the shards, so it shows what training will see.
"""

from pathlib import Path

import numpy as np

from megatron_ft.data.roles import ASSISTANT, ROLE_BITS, all_weights, are_spoken
from megatron_ft.data.shards import Shards, open_shards
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.log import logger
from megatron_ft.wording import counted
from tools.pretokenizer.sources import Source
from tools.pretokenizer.stats import total
from tools.pretokenizer.unread import line
from tools.pretokenizer.writing import Written

SHOWN, TURNS = 160, 6  # characters of a turn, turns of the chat
log = logger("pretokenize")


def show_result(prefix: Path, split: str, written: Written | None, sources: list[Source]) -> None:
    """Print one line about a split, and more if samples were left out. written: None for a split without samples."""
    if written is None:
        print(f"{split + ':':6} no samples, nothing written")
        return
    all_datasets = total(written.tallies)
    shards = open_shards(prefix)
    counts = shards.manifest.counts
    tallies = total(written.mixed) if written.mixed else all_datasets
    trained = 100 * tallies.by_role_byte[_trained(shards)].sum() / counts["tokens"]
    skipped = all_datasets.skipped.total()
    share = f"{trained:.0f}% trained on, {skipped:,} skipped"
    print(
        f"{split + ':':6} {counted(counts['samples'], 'chat')}, {counted(counts['tokens'], 'token')}, {share}"
        f" -> {prefix}-{{text,role}}.{{bin,idx}}"
    )
    if marked := counts.get("marked_tokens", 0):
        print(f"       marked for language-modelling loss: {counted(marked, 'token')}")
    for portion in written.mix:
        share = f"{portion.realised:.1%} of the mix, {portion.requested:.1%} requested"
        print(f"       {portion.name}: {share}, {portion.epochs:.2f} epochs, {counted(len(portion.picks), 'sample')}")
    for reason, count in sorted(all_datasets.skipped.items()):
        print(f"       skipped: {reason}: {count:,}")
    if all_datasets.untrained:
        log.warning(
            "%s: %d chats have no token that is trained on: no assistant turn (--min_assistant_tokens 1 drops those), or the weight 0",
            split,
            all_datasets.untrained,
        )
    if split == "train":
        for source in sources:
            for reason, count in sorted(source.left_out.items()):
                print(f"       left out of {source.name}: {reason}: {count:,}")
            if source.unread:
                print(f"       keys of {source.path.name} that were not read: {line(source.unread)}")


def _trained(shards: Shards) -> np.ndarray:
    """Return which role bytes are trained on by default: the assistant's and marked ones, unless their message has the weight 0."""
    return shards.loss_weights(all_weights(0, {})) > 0


def show_sample(prefix: Path, tokenizer: Tokenizer) -> None:
    """Print the first training chat, shortened, with «» around what is trained on by default."""
    shards = open_shards(f"{prefix}-train")
    ids, role_bytes = shards.tokens(0), shards.role_bytes(0)
    turns = np.where(
        are_spoken(role_bytes), role_bytes - (role_bytes & ROLE_BITS) + ASSISTANT, role_bytes
    )  # an answer is one turn
    starts = [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist()]
    trained = _trained(shards)
    print()
    for start, end in list(zip(starts, [*starts[1:], len(ids)], strict=True))[:TURNS]:
        words = " ".join(tokenizer.decode(ids[start:end], skip_special=True).split())
        shown = words if len(words) <= SHOWN else words[:SHOWN] + " ..."
        print(f"  «{shown}»" if trained[role_bytes[start]] else f"  {shown}")
    print("  «» = trained on" + (f", {counted(len(starts) - TURNS, 'more turn')}" if len(starts) > TURNS else ""))
