"""The structure of the source: which package may import which, and what is named in one place only.

docs/architecture.md shows the same layers. A package that is not written yet is no mistake; one without a layer is.
"""

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 400  # lines; most files are far from it

# Package (or module) -> layer. It imports from lower layers and from itself.
LAYERS = {
    "megatron_ft": 0,  # the package itself: its version
    "megatron_ft.config": 0,
    "megatron_ft.device": 0,
    "megatron_ft.gpu_facts": 0,
    "megatron_ft.errors": 0,
    "megatron_ft.log": 0,
    "megatron_ft.files": 0,
    "megatron_ft.shares": 0,
    "megatron_ft.wording": 0,
    "megatron_ft.collector": 0,
    "megatron_ft.digests": 0,
    "megatron_ft.engine": 1,
    "megatron_ft.launch": 1,
    "megatron_ft.quantization": 1,
    "megatron_ft.models": 2,
    "megatron_ft.data": 2,
    "megatron_ft.checkpoints": 3,
    "megatron_ft.adapters": 4,
    "megatron_ft.sparse": 4,
    "megatron_ft.planner": 5,
    "megatron_ft.training": 5,
    "megatron_ft.generation": 5,
    "megatron_ft.rehearsal": 5,
    "megatron_ft.report": 5,
    "megatron_ft.evaluation": 6,
    "megatron_ft.chat": 6,
    "megatron_ft.doctor": 6,  # starts commands as processes too
    "megatron_ft.importing": 6,
    "megatron_ft.steps": 6,  # starts the commands as processes, so it stands below them
    "megatron_ft.demo": 7,
    "megatron_ft.tune": 7,
    "megatron_ft.commands": 8,
    "megatron_ft.__main__": 9,
    # Beside megatron_ft: they use checkpoints, models and data, and no package of it imports them.
    "checkpoints_conversion": 5,
    "tools.pretokenizer": 5,
}
# In the lowest layer these import each other, in this order: a file is read with a typed error, flags from a file.
LOWEST = [
    "megatron_ft",
    "megatron_ft.errors",
    "megatron_ft.log",
    "megatron_ft.files",
    "megatron_ft.shares",
    "megatron_ft.wording",
    "megatron_ft.collector",
    "megatron_ft.digests",
    "megatron_ft.config",
    "megatron_ft.device",
    "megatron_ft.gpu_facts",
]
OUTSIDE = ("checkpoints_conversion", "tools.pretokenizer")
SOURCE_FOLDERS = ("megatron_ft", "checkpoints_conversion", "tools/pretokenizer")


def sources() -> dict[str, Path]:
    """Module name -> file of everything that is installed."""
    found = {}
    for folder in SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package(module: str) -> str:
    """Return the longest name in LAYERS that a module's name starts with."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next((name for name in names if name in LAYERS), None)
    assert found and (found != "megatron_ft" or module == "megatron_ft"), f"{module} is in no layer: give it one here"
    return found


def imports(module: str) -> dict[str, int]:
    """Our modules that this one imports, at the top or inside functions -> line. Those for type checkers too."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert not node.level, f"{place(module, node.lineno)}: a relative import; write the full name"
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        for name in names:
            if name in MODULES and name != module:
                found.setdefault(name, node.lineno)
    return found


def may_import(here: str, there: str) -> bool:
    """Return whether a module of package `here` may import one of package `there`."""
    if here == there:
        return True
    if there in OUTSIDE:
        return False
    if LAYERS[here] == LAYERS[there] == 0:
        return LOWEST.index(there) < LOWEST.index(here)
    return LAYERS[there] < LAYERS[here]


def place(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def test_imports_go_downward():
    wrong = [
        f"{place(module, line)} imports {target}"
        for module in MODULES
        for target, line in imports(module).items()
        if not may_import(package(module), package(target))
    ]
    assert not wrong, "upward, or across a layer:\n" + "\n".join(wrong)


def test_the_document_shows_these_layers():
    """Each row of the table in docs/architecture.md: a layer, and its packages in code spans."""
    shown = {}
    for line in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (\d) \| (`[^|]+`) \|", line):
            for name in re.findall(r"`([\w./]+)`", match[2]):
                name = name.removesuffix("/").removesuffix(".py").replace("/", ".")
                shown[name if name in OUTSIDE else f"megatron_ft.{name}"] = int(match[1])
    there = {package(module) for module in MODULES} - {"megatron_ft"}
    assert shown == {name: LAYERS[name] for name in there}


def test_imports_make_no_circle():
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, "circle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in imports(module):
                walk(target, [*trail, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])


def words(path: Path) -> list[tuple[str, int]]:
    """Names and string literals with their line; comments and docstrings, which only explain, are left out."""
    docstrings = {
        node.value.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return [
        (token.string, token.start[0])
        for token in tokens
        if token.type in kinds and not (token.type == tokenize.STRING and token.start[0] in docstrings)
    ]


FOREIGN_NAMES = {'"argparse"'}
"""What stands in others' checkpoints: the name of a module that a pickle asks for and does not get."""


DEVICE = ("megatron_ft/device.py", "megatron_ft/engine/cpu_stand_in.py", "megatron_ft/gpu_facts.py")


@pytest.mark.parametrize(
    "pattern, allowed",
    [
        (r"\bcuda\b", DEVICE),  # a whole word: megatron-core has it in names of functions
        (r"\b(gloo|nccl)\b", DEVICE),
        # Not within a longer text, which may advise to set it.
        (r"^\W?(MEGATRON_FT_DEVICE|CUDA_VISIBLE_DEVICES|/dev/(nvidia|kfd).*)\W?$", DEVICE),
        (r"\bargparse\b", "megatron_ft/config/"),
        (r"\bsys\.argv\b|\bargv\b", ("megatron_ft/config/", "megatron_ft/__main__.py")),
        (r"\bGPTModel\b", "megatron_ft/models/build.py"),
    ],
    ids=["cuda", "gloo and nccl", "how the CPU is chosen", "argparse", "argv", "GPTModel"],
)
def test_named_in_one_place_only(pattern, allowed):
    wrong = []
    for path in MODULES.values():
        if not str(path.relative_to(ROOT)).startswith(allowed):
            wrong += [
                f"{path.relative_to(ROOT)}:{line} {word}"
                for word, line in words(path)
                if re.search(pattern, word) and word not in FOREIGN_NAMES
            ]
    assert not wrong, f"only {allowed} may name it:\n" + "\n".join(wrong)


def tracked(*patterns: str) -> list[Path]:
    """Files git knows or would take, so that what tools leave behind does not count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_files_are_short_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): n
        for path in tracked("*.py")
        if (n := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long, f"more than {LONGEST} lines: {long}"


def test_every_module_says_what_it_is():
    silent = [module for module, path in MODULES.items() if tree(path).body and not ast.get_docstring(tree(path))]
    assert not silent, f"without a docstring: {silent}"


def test_no_one_s_home_or_index_is_written_down():
    public = re.escape(" https://download.pytorch.org/whl/")
    home = re.compile(rf"(?<![\w.])/(home|Users|root|work)/\w|--(extra-)?index-url(?!{public})|\bfile:///")
    wrong = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # pictures, models
        wrong += [
            f"{path.relative_to(ROOT)}:{n} {line.strip()[:80]}" for n, line in enumerate(lines, 1) if home.search(line)
        ]
    assert not wrong, "\n".join(wrong)


def test_every_command_is_where_the_table_says():
    from megatron_ft.commands.table import ENTRIES

    for name, entry in ENTRIES.items():
        if entry.module in MODULES:  # one that is not written yet is found by the test of its own
            defined = {
                target.id
                for node in tree(MODULES[entry.module]).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            } | {node.name for node in tree(MODULES[entry.module]).body if isinstance(node, ast.FunctionDef)}
            assert {"COMMAND", "run"} <= defined, f"{name}: {entry.module} lacks COMMAND or run"
