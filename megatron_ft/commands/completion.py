"""megatron-ft completion: print a script that completes commands and flags in bash or zsh.

The script contains all names, so that completion does not start Python.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from megatron_ft.commands.table import ALIASES, ENTRIES, load, starting_with
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.fields import options_of
from megatron_ft.config.flags import spellings


@dataclass
class Completion:
    """Shell"""

    shell: Literal["bash", "zsh"] = field(default="bash", metadata={"required": True})
    """shell that the script is for"""


COMMAND = Command(
    name="completion",
    summary="print a script that completes commands and flags in bash or zsh",
    sections=(Completion,),
    examples=('eval "$(megatron-ft completion bash)"', "megatron-ft completion zsh >> ~/.zshrc"),
    positional=("shell",),
)


def run(options: Completion) -> int:
    """Print the script."""
    cases = []
    for name in ENTRIES:
        words = spellings(options_of(load(name)[0].sections))
        cases.append(f"    {' | '.join(_names(name))}) words='{' '.join(words)}' ;;")
    first = dict.fromkeys(name.split()[0] for name in ENTRIES)
    groups = {word: [name.split()[1] for name in starting_with(word)] for word in first if starting_with(word)}
    commands = " ".join([*first, *ALIASES])
    start = "autoload -U +X bashcompinit && bashcompinit\n" if options.shell == "zsh" else ""
    print(start + _SCRIPT.format(commands=commands, cases="\n".join(cases), groups=_groups(groups)), end="")
    return 0


_SCRIPT = """_megatron_ft() {{
  local words='{commands} --help --version' name="${{COMP_WORDS[1]}}" named=1
  case "$name" in
{groups}
  esac
  if [ "$COMP_CWORD" -gt "$named" ]; then
    case "$name" in
{cases}
    *) words='' ;;
    esac
  fi
  local here="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -gt "$named" ] && [ "${{here#-}}" = "$here" ]; then
    COMPREPLY=($(compgen -f -- "$here"))
  else
    COMPREPLY=($(compgen -W "$words" -- "$here"))
  fi
}}
complete -o filenames -F _megatron_ft megatron-ft
"""


def _groups(groups: dict[str, list[str]]) -> str:
    """Return the lines that take a second word into the name. While it is typed, it is completed like the first."""
    return "\n".join(
        f"""  {word}) [ "$COMP_CWORD" -gt 1 ] && words='{" ".join(seconds)} --help' name="$name ${{COMP_WORDS[2]}}" named=2 ;;"""
        for word, seconds in groups.items()
    )


def _names(name: str) -> list[str]:
    return [f"'{one}'" for one in (name, *(alias for alias, whole in ALIASES.items() if whole == name))]


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
