"""Turns a command line into filled-in sections, and the result of a command into an exit code.

Settings come from flags, then from the file given with --config, then from the dataclasses' defaults. No other module reads argv.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.config import megatron_flags, translate
from megatron_ft.config.command import Command
from megatron_ft.config.fields import Option, default_of, flat, members, options_of
from megatron_ft.config.flags import Given, read_flags
from megatron_ft.config.rank_errors import has_shared_folder, is_loss, print_once, should_report, write_stack_on_signal
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import check_file_writable, check_prefix_writable, check_writable
from megatron_ft.log import setup

__all__ = ["Command", "parse", "run_script", "write_sections"]

MISTAKE = "MEGATRON_FT_MISTAKE"
"""Environment variable: a file to create when a command ends with exit code 2. In a job on several machines the scheduler may report
another exit code: that of the processes which it ended because of this one."""
_OUTSIDE = {getattr(errno, name) for name in "EACCES EPERM EROFS ENOSPC EDQUOT ENOTDIR EISDIR EEXIST".split()}
"""System errors that the user can fix: a read-only folder, a full disk."""


def parse(command: Command, argv: Sequence[str]) -> list[Any]:
    """Return one instance of each of the command's sections and groups, in order; with open_flags, last, a dict of the unknown flags.

    Raise ConfigError for a user's mistake, and SystemExit(0) after --help or --print_config have printed.
    """
    options = options_of(command.sections)
    given = read_flags(command, options, list(argv))
    values, others = _resolve(command, options, given)
    if given.print_config:
        from megatron_ft.config.yaml_file import write_settings

        print(write_settings(flat(command.sections), values, options, others), end="")
        raise SystemExit(0)
    _check_needed(options, values)
    filled = [_build(section, options, values) for section in command.sections]
    return [*filled, others] if command.open_flags else filled


def write_sections(filled: Sequence[Any]) -> str:
    """Return filled-in sections as YAML. --config reads it back to the same values."""
    from megatron_ft.config.yaml_file import write_settings

    sections = tuple(type(section) for section in filled)
    values = {name: value for section in filled for name, value in vars(section).items()}
    return write_settings(sections, values, options_of(sections), {})


def run_script(command: Command, run: Callable[..., int | None], argv: Sequence[str] | None = None) -> int:
    """Parse, call run(*sections), and return the exit code: 0, 2 (user error), 1 (bug or temporary fault), 130 (Ctrl-C).

    argv: without the program's name; None: that of this process.
    """
    code = _outcome(command, run, argv)
    if code == UserError.exit_code and (note := os.environ.get(MISTAKE)):
        with contextlib.suppress(OSError):
            Path(note).touch()
    return code


def _outcome(command: Command, run: Callable[..., int | None], argv: Sequence[str] | None) -> int:
    setup()
    write_stack_on_signal()
    sections = None
    try:
        sections = parse(command, sys.argv[1:] if argv is None else argv)
        _check_places(command, sections)
        return run(*sections) or 0
    except UserError as error:
        _report(command, error, parsed=sections is not None)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        # The terminal sends it to all processes, and the launcher forwards it once more.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        line = f"megatron-ft {command.name}: stopped by Ctrl-C"
        if has_shared_folder():
            print_once(line)
            sys.stdout.flush()
            os._exit(130)
        print(line, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a program that a closed pipe ended
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUTSIDE:
            where = f"{error.filename}: " if error.filename else ""
            _report(
                command, UserError(f"{where}{error.strerror}; check the path, its rights and the disk"), parsed=True
            )
            return UserError.exit_code
        if should_report(error):
            _explain(command, error)
        elif has_shared_folder():
            sys.stdout.flush()
            os._exit(1)  # closing broken connections in order would print more errors, or hang
        return 1


def _resolve(command: Command, options: dict[str, Option], given: Given) -> tuple[dict[str, Any], dict[str, Any]]:
    from megatron_ft.config.values import checked, from_text

    values = {name: default_of(option) for name, option in options.items() if not option.required}
    others: dict[str, Any] = {}
    megatron: dict[str, megatron_flags.Given] = {}
    levels = {}
    if given.config is not None:
        from megatron_ft.config.yaml_file import read_settings

        taken = megatron if command.megatron_flags else None
        entries, others = read_settings(given.config, options, command.open_flags, taken)
        for name, entry in entries.items():
            values[name] = checked(options[name], entry.value, f"{entry.where}: {name}")
            levels[name] = 1
    for name, text in given.values.items():
        values[name] = text if isinstance(text, bool) else from_text(options[name], text, f"--{name}")
        levels[name] = 2
    _keep_one(options, values, levels)
    if command.megatron_flags:
        values |= translate.apply(megatron | given.megatron, values, levels)
    return values, others | given.others


def _check_needed(options: dict[str, Option], values: dict[str, Any]) -> None:
    """Raise ConfigError for required settings without a value, unless the setting that may be given instead has one."""
    missing = []
    for option in options.values():
        if not option.required or values.get(option.name) is not None:
            continue
        if option.instead and values.get(option.instead) is not None:
            values[option.name] = default_of(option)
        else:
            missing.append(f"--{option.name}" + (f" (or --{option.instead})" if option.instead else ""))
    if missing:
        raise ConfigError(f"needed and not given: {', '.join(missing)}; see --help")


def _keep_one(options: dict[str, Option], values: dict[str, Any], levels: dict[str, int]) -> None:
    """Of two settings of which one may be given in place of the other, keep that of the command line, not that of the file."""
    for option in options.values():
        if option.instead is None or values.get(option.name) is None or values.get(option.instead) is None:
            continue
        mine, other = (levels.get(name, 0) for name in (option.name, option.instead))
        if mine > other:
            values[option.instead] = default_of(options[option.instead])
        elif mine < other:
            del values[option.name]


def _check_places(command: Command, sections: Sequence[Any]) -> None:
    """Raise UserError for a folder or file of `writes` that cannot be written, before anything is computed for it."""
    check = {"folder": check_writable, "file": check_file_writable, "prefix": check_prefix_writable}
    for option in options_of(command.sections).values():
        holder = next((section for section in sections if type(section) is option.section), None)
        if option.writes and (place := getattr(holder, option.name, None)):
            check[option.writes](f"--{option.name}", place)


def _build(section: type, options: dict[str, Option], values: dict[str, Any]) -> Any:
    if parts := members(section):
        return section(**{name: _build(kind, options, values) for name, kind in parts.items()})
    return section(**{name: values[name] for name, option in options.items() if option.section is section})


def _report(command: Command, error: UserError, parsed: bool) -> None:
    # An error in the arguments is the same in every process of a machine, so one process prints it. Without a shared folder each
    # process prints later errors, with its rank.
    line = f"megatron-ft {command.name}: error: {' '.join(str(error).split())}"
    if has_shared_folder():
        print_once(line)
    elif parsed or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = os.environ.get("RANK", "0")
        print(line + (f" (rank {rank})" if parsed and rank != "0" else ""), file=sys.stderr)


def _explain(command: Command, error: Exception) -> None:
    """Print the traceback; for a lost connection one line, because another process is the cause."""
    rank = os.environ.get("RANK")
    if rank is not None and is_loss(error):
        reason = " ".join(str(error).split())[-200:]
        print(
            f"megatron-ft {command.name}: error: rank {rank} lost another process of the run, which ended or does not respond; "
            f"the error of that process is the cause ({reason})",
            file=sys.stderr,
        )
        return
    if rank is not None:
        print(f"megatron-ft {command.name}: error: rank {rank} failed:", file=sys.stderr)
    traceback.print_exception(error)
