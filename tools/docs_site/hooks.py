"""Hooks of mkdocs (mkdocs.yml): pages from outside docs/, and links that lead to the same files on the site as in the repository.

README.md is the start page. READMEs of the examples, CHANGELOG and the like are pages of their own, notebooks too. A file that a page links
to, such as a script, is copied.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/**/README.md",
    "examples/**/*.ipynb",
)
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages from outside docs/, the files that pages link to, and the style."""
    from mkdocs.structure.files import File  # here: tests read this module without mkdocs

    for path in outside():
        files.append(File.generated(config, site_path(path), content=text_of(path)))
    for path in copied():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "extra.css", abs_src_path=str(Path(__file__).with_name("extra.css"))))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page whose links lead to the places of their files on the site."""
    here = page.file.src_uri
    found = targets(in_repository(here))
    return LINK.sub(lambda match: relative(found[match[1]], here) if match[1] in found else match[1], markdown)


def outside() -> list[str]:
    """Return the pages outside docs/, as paths from the root of the repository."""
    return [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]


def copied() -> list[str]:
    """Return the files outside docs/ that pages link to and that are no pages."""
    pages = [*outside(), *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
    linked = {path for page in pages for path in targets(page).values() if not path.startswith("docs/")}
    return sorted(linked - set(outside()))


def targets(page: str) -> dict[str, str]:
    """Return the links of a page to files of the repository: as written -> path from the root."""
    found = {}
    for written in LINK.findall(text_of(page)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), written))
        if "://" not in written and (ROOT / path).is_file():
            found[written] = path
    return found


def relative(path: str, here: str) -> str:
    return posixpath.relpath(site_path(path), posixpath.dirname(here) or ".")


def site_path(path: str) -> str:
    """Return the place of a file of the repository on the site."""
    if path == "README.md":
        return "index.md"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def in_repository(place: str) -> str:
    """Return the file of the repository that is at a place on the site."""
    if place == "index.md":
        return "README.md"
    if in_docs(place):
        return f"docs/{place}"
    notebook = re.sub(r"\.md$", ".ipynb", place)
    return notebook if (ROOT / notebook).is_file() else place


def in_docs(place: str) -> bool:
    return (ROOT / "docs" / place).is_file()


def text_of(path: str) -> str:
    """Return the Markdown of a page of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return as_markdown(json.loads(text)) if path.endswith(".ipynb") else text


def as_markdown(notebook: dict[str, Any]) -> str:
    """Return a notebook as a page: code in fences, what it prints below."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        printed = "".join(text for output in cell.get("outputs", []) for text in output.get("text", []))
        parts += [f"```text\n{printed}```"] if printed else []
    return "\n\n".join(parts)
