"""What is shown while an answer grows: never half a character, never the beginning of a stop string, in the end the whole answer."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.generation.stop_strings import StopStrings
from megatron_ft.generation.streaming import TextStream, begun

SPECIAL = "<|end|>"


class Bytes:
    """A tokenizer with a token for each byte and a special one, 256."""

    special_tokens = (SPECIAL,)

    def decode(self, ids, skip_special=False):
        runs = bytes(i for i in ids if i < 256) if skip_special else b"".join(self.piece(i) for i in ids)
        return runs.decode(errors="replace")

    @staticmethod
    def piece(index):
        return SPECIAL.encode() if index == 256 else bytes([index])


def shown(ids, stop=()):
    """(what is shown after each token and at the end, the answer), as ChatModel.stream does it."""
    tokenizer, pieces = Bytes(), []
    stream = TextStream(tokenizer, stop)
    stops = StopStrings(stop, tokenizer.decode) if stop else None
    for count in range(1, len(ids) + 1):
        if stops and stops.is_over(ids[:count]):
            ids = ids[:count]
            break
        if count < len(ids):
            pieces.append(stream.more(ids[:count]))
    answer = tokenizer.decode(ids, skip_special=True).strip()
    if stops and stops.cut(tokenizer.decode(ids)) != tokenizer.decode(ids):
        answer = stops.cut(tokenizer.decode(ids)).replace(SPECIAL, "").strip()
    return [*pieces, stream.rest(answer)], answer


texts = st.text(alphabet="abé漢😀 \nUser:", max_size=30)


@given(texts, st.lists(texts.filter(bool), max_size=3))
def test_the_pieces_are_the_answer(text, stop):
    pieces, answer = shown(list(text.encode()), stop)
    assert "".join(pieces) == answer


@given(st.lists(st.integers(0, 256), max_size=20))
def test_any_bytes_and_special_tokens(ids):
    pieces, answer = shown(ids)
    assert "".join(pieces).endswith(answer)


def test_a_character_of_several_tokens_comes_whole():
    pieces, _ = shown(list("né 😀!".encode()))
    assert pieces == ["n", "", "é", "", "", "", "", " 😀", "!"]


def test_a_stop_string_does_not_flash():
    pieces, answer = shown(list(b"Hello User: no"), ["User:"])
    assert (pieces, answer) == (["H", "e", "l", "l", "o", "", "", "", "", "", ""], "Hello")
    pieces, answer = shown(list(b"Use it, User"), ["User:"])
    assert "".join(pieces) == answer == "Use it, User" and pieces[:5] == ["", "", "", "Use", " i"]


def test_a_special_token_within_a_stop_string():
    ids = [*b"Yes", 256, *b"User"]
    pieces, answer = shown(ids, ["<|end|>User"])
    assert (pieces[:3], answer) == (["Y", "e", "s"], "Yes") and not any(pieces[3:])


def test_what_may_become_a_stop_string():
    assert begun("one tw", ["two", "one two three"]) == "one tw"
    assert begun("one two three", ["two"]) == "two three"
    assert begun("one", ["two", "x"]) == ""
