"""A SentencePiece model as the base vocabulary of a tokenizer.

SentencePiece puts a space (its "dummy prefix") before every text, so the text between two control tokens also starts with one, as in
Megatron-LLM. Tokens outside its vocabulary are handled by tokenizer.py.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data import bulk
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.sentencepiece_export import CONTROL, describe, is_exact
from megatron_ft.errors import TokenizerError, half_a_character


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
        self._bulk: bulk.Bulk | None = None

    @property
    def bos(self) -> str | None:
        """The name of the token that begins a document, for instance <s>."""
        return self._model.id_to_piece(self._model.bos_id()) if self._model.bos_id() >= 0 else None

    @property
    def eos(self) -> str | None:
        return self._model.id_to_piece(self._model.eos_id()) if self._model.eos_id() >= 0 else None

    def encode_batch(self, texts: list[str], at_start: bool) -> list[np.ndarray]:
        del at_start  # every text gets the dummy prefix
        if self._bulk is not None:
            try:
                return self._bulk.encode(texts)
            except bulk.Failed:
                self._bulk = None
        return self._by_reference(texts)

    def hasten(self, texts: Sequence[str]) -> bool:
        """See tokenizer.Tokenizer.hasten."""
        proto = self.proto()
        if is_exact(proto):
            with contextlib.suppress(TokenizerError):  # what a tokenizer.json cannot express
                self._bulk = bulk.agreeing(describe(proto, self.path), self._by_reference, texts)
        return self._bulk is not None

    def _by_reference(self, texts: list[str]) -> list[np.ndarray]:
        try:
            return self._model.encode(texts, return_type="numpy", num_threads=self.threads)
        except (UnicodeEncodeError, TypeError, RuntimeError) as error:  # the binding's error for a lone surrogate
            raise half_a_character() from error

    def starts(self, texts: list[str], at_start: bool) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Return (ids, the byte of the text at which each token begins, True) of each text."""
        del at_start
        try:
            found = self._model.encode(texts, return_type="proto", num_threads=self.threads)
        except (UnicodeEncodeError, TypeError) as error:
            raise half_a_character() from error
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

    def as_json(self, own_spaces: bool = True) -> dict[str, Any]:
        """Return the model as a tokenizer.json; see sentencepiece_export.describe."""
        return describe(self.proto(), self.path, own_spaces)

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
        self._bulk = None

    def write(self, path: Path) -> None:
        """Copy the model file as it was read."""
        path.write_bytes(self._data)
