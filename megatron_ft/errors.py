"""The types of errors that a user can fix.

A message is one line with three parts: what is wrong (with both values if two disagree), where (file, line, flag), how to fix it. The
command line prints it and exits with 2, or with 1 if the fault is one of the machine and may be temporary. Any other exception is a bug:
a traceback and exit code 1.
"""


class UserError(Exception):
    """An error that the user can fix. Only the message is shown."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a configuration file, or two settings that do not fit together."""


class EngineError(UserError):
    """A megatron-core that this package was not tried with, or that lacks a part which this package changes."""


class DataError(UserError):
    """Chat files or shards: missing, cut short, or made for another model."""


class TokenizerError(UserError):
    """A tokenizer that cannot be read, or that lacks a token."""


class CheckpointError(UserError):
    """A checkpoint or exported model: missing, incomplete, or of another shape."""


class PassingFault(CheckpointError):
    """A temporary fault of a disk, a process or another job. The same command may succeed later; launch scripts start it again."""

    exit_code = 1


class DamagedError(CheckpointError):
    """A file of a checkpoint or export that is not what was written: missing, cut short, or with other content."""


def half_a_character() -> TokenizerError:
    return TokenizerError("text with a lone surrogate (half a character) cannot be tokenized")


def kind_of(value: object) -> str:
    """Return what kind of value of a data file this is, in JSON's words: null, text, a number, a list, an object, true, false."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = (
        (str, "text"),
        ((int, float), "a number"),
        ((list, tuple), "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")
