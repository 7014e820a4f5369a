"""Every command line in the documentation is one that our command line understands, and every link leads somewhere."""

import re
import shlex

import pytest

from megatron_ft.commands.table import ALIASES, ENTRIES, load
from megatron_ft.config.cli import parse
from megatron_ft.config.fields import options_of
from megatron_ft.config.flags import spellings
from megatron_ft.config.hints import HUGGING_FACE
from tests.test_layers import ROOT, tracked

PAGES = [path for path in tracked("*.md", "*.sh", "*.sbatch") if path.name != "CHANGELOG.md"]
FOREIGN = {"coming_from.md"}  # its left columns hold other tools' flags
CALL = re.compile(r"^(?:.*\s)?(?:megatron-ft|-m megatron_ft)\s+([a-z][\w-]*)(\s.*)?$")


OTHERS = (
    "benchmarks/", "srun ", "sbatch ", "scancel ", "scontrol ", "pip ", "python3 ", "docker ", "apptainer ",
)  # fmt: skip
"""Programs whose flags are their own."""


def command_lines(text: str) -> list[tuple[str, str]]:
    """(command, the rest of its line) of every line of a code block that starts one of our commands."""
    blocks = re.findall(r"^```(?:bash|sh|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4}.*\n?)+", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = (CALL.match(line.strip()) for line in lines)
    return [pair for match in found if match and (pair := named(match[1], match[2] or ""))]


def named(word: str, rest: str) -> tuple[str, str] | None:
    """Return the name of the command, which may take a second word, and what is left of its line."""
    second, _, after = rest.strip().partition(" ")
    if f"{word} {second}" in ENTRIES:
        return f"{word} {second}", after
    name = ALIASES.get(word, word)
    return (name, rest) if name in ENTRIES else None


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_are_understood(page):
    for name, rest in command_lines(page.read_text(encoding="utf-8")):
        plain = re.sub(r"\$\([^)]*\)|\$\{?\w+\}?", "1", re.split(r" [|>&]", rest)[0])  # a shell's variables
        words = shlex.split(plain, comments=True)
        if "..." in words or "--config" in words or not words:
            continue
        command, _ = load(name)
        try:
            parse(command, words)
        except SystemExit as stop:  # --help and the like
            assert stop.code == 0, rest


def test_commands_are_found():
    assert sum(len(command_lines(page.read_text(encoding="utf-8"))) for page in PAGES) > 30


def test_flags_in_running_text_exist():
    known = {flag for name in ENTRIES for flag in spellings(options_of(load(name)[0].sections))}
    known |= {"--help", "--version", "--key", "--no_key", "--x", "--no_x"} | {f"--{name}" for name in HUGGING_FACE}
    known |= {"--filename_prefix", "--no_min_assistant_tokens"}  # settings of the pretokenizer's own files
    theirs = {"--nproc_per_node", "--nnodes", "--signal", "--rdzv_backend", "--node_rank", "--constraint", "--array"}
    theirs |= {"--kill_on_bad_exit", "--dependency"}
    wrong = []
    for page in PAGES:
        if page.suffix == ".md" and page.name not in FOREIGN:
            spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
            ours = [span for span in spans if not span.startswith(OTHERS)]
            flags = {flag for span in ours for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
            wrong += [
                f"{page.name}: {flag}" for flag in flags if f"--{flag[2:].replace('-', '_')}" not in known | theirs
            ]
    assert not wrong, "no command has these: " + ", ".join(wrong)


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        todo += [page.parent / target for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))]
    lost = {page for page in PAGES if page.suffix == ".md" and page.parent.name == "docs"} - reached
    assert not lost, f"no way from the README to {sorted(path.name for path in lost)}"
