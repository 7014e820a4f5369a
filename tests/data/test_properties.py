"""What holds for any conversation whatever: it comes back from the shards, and no text of it becomes a control token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data.chat_format import CHATML, FORMATS
from megatron_ft.data.roles import ROLES
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.helpers import CONTROLS, fast_file, sentencepiece_file

# Any Unicode but half characters and SentencePiece's own mark for a space, mixed with what looks like control tokens.
TRICKS = st.sampled_from([*CONTROLS, "<s>", "</s>", "<unk>", "<eos>", "<0x0A>", "\n", "  ", "<|im_start|>assistant\n"])
TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | TRICKS, max_size=6).map(
    "".join
)
CHATS = st.lists(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(list(ROLES)), "content": TEXT}), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module", params=[sentencepiece_file, fast_file], ids=["sentencepiece", "byte-level"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")), CONTROLS)


@settings(max_examples=100, deadline=None)
@given(chats=CHATS)
def test_any_conversation_comes_back_from_the_shards(tokenizer, tmp_path_factory, chats):
    prefix = tmp_path_factory.mktemp("shards") / "x"
    with ShardWriter(prefix, tokenizer.vocab_size, tokenizer.info()) as writer:
        for ids, roles in CHATML.encode_many(tokenizer, chats):
            writer.add(ids, roles)
    shards = open_shards(prefix)
    for i, chat in enumerate(chats):
        tokens, roles = shards.tokens(i), shards.roles(i)
        assert len(tokens) == len(roles) == shards.lengths[i]
        assert tokenizer.decode(tokens) == CHATML.text(chat)
        # Exactly one pair of control tokens a message, and the roles of the messages in order.
        starts = np.flatnonzero(tokens == tokenizer.token_id("<|im_start|>"))
        assert len(starts) == np.count_nonzero(tokens == tokenizer.token_id("<|im_end|>")) == len(chat)
        assert roles[starts].tolist() == [ROLES[message["role"]] for message in chat]
        controls = [i for name, i in tokenizer.special_tokens.items() if name not in CONTROLS]
        assert not np.isin(tokens, controls).any()


@settings(max_examples=60, deadline=None)
@given(chats=CHATS, name=st.sampled_from(sorted(FORMATS)), mark_bits=st.sampled_from([0, 0b1000, 0b110000]))
def test_any_conversation_in_any_format(tokenizer, chats, name, mark_bits):
    """Ids and roles agree in length, no text of a message becomes a control token, and a batch is its parts."""
    chat_format = FORMATS[name]
    known = load_tokenizer(tokenizer.source_files[0], [*CONTROLS, *chat_format.added_tokens])
    chats = [[*chat, {"role": "assistant", "content": "x", "mark_bits": mark_bits}] for chat in chats]
    controls = list(known.special_tokens.values())
    for chat, (ids, role_bytes) in zip(chats, chat_format.encode_many(known, chats), strict=True):
        assert len(ids) == len(role_bytes) > 0
        assert int(role_bytes[-1]) == ROLES["assistant"] | mark_bits
        alone, _ = chat_format.encode(known, chat)
        assert alone.tolist() == ids.tolist()
        silent, _ = chat_format.encode(known, [{**message, "content": "x"} for message in chat])
        spoken = Counter(ids[np.isin(ids, controls)].tolist())
        assert spoken == Counter(silent[np.isin(silent, controls)].tolist())
