"""Checks that fail in every way, for tests of the runner."""

import ctypes
import sys
import time

from megatron_ft.doctor.result import passed
from megatron_ft.errors import UserError


def segfault(folder):
    print("last words", file=sys.stderr, flush=True)
    ctypes.string_at(0)


def hang(folder):
    time.sleep(1000)


def bug(folder):
    raise ValueError("the cat\nsat on it")


def mistake(folder):
    raise UserError("the disk is full: make room")


def leave(folder):
    sys.exit(3)


def sound(folder):
    return passed("it works")
