"""Unpickles files of other programs with few instructions, few names, and memory bounded by the size of the file.

Python's unpickler in C calls what a file names and executes every instruction. A short file can make it reserve gigabytes (a memo number
is an array index) or change a class for the rest of the process. This one, derived from the standard library's version in Python,
supports only the instructions in torch's files and the metadata of checkpoints, and calls `find` for every name.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS "
    "GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET BINPERSID"
).split()


class PlainUnpickler(pickle._Unpickler):
    """An unpickler. load() can raise any exception if the data is not a plain pickle.

    find: (module, name) -> its replacement; raises UnpicklingError for a name that is not allowed. persistent: persistent id -> its
    object; torch's storages have such ids.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS
    }

    def __init__(
        self, data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._find, self._persistent = find, persistent

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)

    def persistent_load(self, identity: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to objects outside itself")
        return self._persistent(identity)

    def load_build(self) -> None:
        """Fill an object with its state: its own dictionary only, and only an object, never a class or a function."""
        state, target = self.stack[-1], self.stack[-2]
        if isinstance(target, type) or callable(target):
            raise pickle.UnpicklingError("it changes what it names")
        if isinstance(state, tuple) and not hasattr(target, "__setstate__"):
            raise pickle.UnpicklingError("it sets attributes one by one")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build
