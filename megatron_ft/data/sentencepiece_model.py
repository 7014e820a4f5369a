"""A SentencePiece model as the base vocabulary of a tokenizer.

SentencePiece puts a space (its "dummy prefix") before every text, so the text between two control tokens also starts with one, as in
Megatron-LLM. Tokens outside its vocabulary are handled by tokenizer.py.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.words import SPACE, PieceWords
from megatron_ft.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces in sentencepiece_model.proto


class SentencePieceModel:
    """See tokenizer.Backend."""

    kind = "sentencepiece"
    threads = os.cpu_count() or 1

    def __init__(self, path: Path):
        import sentencepiece

        self.path, self._data = path, path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._data)
        except Exception as error:  # the binding can raise any exception
            raise TokenizerError(f"{path}: not a SentencePiece model ({error}); is it the whole file?") from error
        self.size = self._model.get_piece_size()
        self.highest = self.size - 1
        inner = [i for i in range(self.size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.controls = {self._model.id_to_piece(i): i for i in inner}
        self.fingerprint = fingerprint(self._data)
        self._words = self._word_table()

    @property
    def bos(self) -> str | None:
        """The name of the token that begins a document, for instance <s>."""
        return self._model.id_to_piece(self._model.bos_id()) if self._model.bos_id() >= 0 else None

    @property
    def eos(self) -> str | None:
        return self._model.id_to_piece(self._model.eos_id()) if self._model.eos_id() >= 0 else None

    def encode_batch(self, texts: list[str], at_start: bool) -> list[np.ndarray]:
        del at_start  # every text gets the dummy prefix
        try:
            if self._words is not None:
                return list(map(self._words.encode, texts))
            return self._model.encode(texts, return_type="numpy", num_threads=self.threads)
        except (UnicodeEncodeError, TypeError, RuntimeError) as error:  # the binding's error for a lone surrogate
            raise TokenizerError("text with a lone surrogate (half a character) cannot be tokenized") from error

    def starts(self, texts: list[str], at_start: bool) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Return (ids, the byte of the text at which each token begins, True) of each text."""
        del at_start
        try:
            found = self._model.encode(texts, return_type="proto", num_threads=self.threads)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError("text with a lone surrogate (half a character) cannot be tokenized") from error
        return [
            (
                np.fromiter((piece.id for piece in one.pieces), np.int32, len(one.pieces)),
                np.fromiter((piece.begin for piece in one.pieces), np.int64, len(one.pieces)),
                True,
            )
            for one in found
        ]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids) if ids else ""

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def find(self, piece: str) -> int | None:
        index = self._model.piece_to_id(piece)
        return index if self._model.id_to_piece(index) == piece else None

    def pieces(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.size)]

    def proto(self) -> Any:
        """Return the model as a protocol buffer: pieces with scores and kinds, normalizer_spec, trainer_spec."""
        from sentencepiece import sentencepiece_model_pb2

        message = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        message.ParseFromString(self._model.serialized_model_proto())
        return message

    def reserve(self, tokens: dict[str, int]) -> None:
        """Keep text from yielding these tokens.

        A control token that was trained into the model as a "user defined" piece matches wherever text spells it; as
        a control piece it does not.
        """
        import sentencepiece

        inside = [i for i in tokens.values() if i < self.size and not self._model.is_control(i)]
        if not inside:
            return
        message = self.proto()
        for index in inside:
            message.pieces[index].type = CONTROL
        self._model = sentencepiece.SentencePieceProcessor(model_proto=message.SerializeToString())
        self._words = self._word_table()

    def _word_table(self) -> PieceWords | None:
        """Return a table of words for models that allow it; the others encode whole texts."""
        return PieceWords(self._model.encode) if are_apart(self.proto()) else None

    def write(self, path: Path) -> None:
        """Copy the model file as it was read."""
        path.write_bytes(self._data)


def are_apart(proto: Any) -> bool:
    """Return whether words of this model (a ModelProto) can be encoded one by one: byte pair encoding, text taken as it is, and no piece
    that reaches over a space or holds a newline."""
    rules, trained = proto.normalizer_spec, proto.trainer_spec
    return (
        trained.model_type == 2  # BPE
        and not rules.precompiled_charsmap
        and rules.add_dummy_prefix
        and not rules.remove_extra_whitespaces
        and rules.escape_whitespaces
        and not trained.treat_whitespace_as_suffix
        and not any(
            SPACE in piece.piece.lstrip(SPACE) or "\n" in piece.piece or " " in piece.piece
            for piece in proto.pieces
            if piece.type in (NORMAL, USER_DEFINED)
        )
    )
