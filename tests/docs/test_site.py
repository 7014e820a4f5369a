"""The web site (mkdocs.yml, tools/docs_site): every page is in the menu, and links that lead somewhere here lead to the same page there."""

import posixpath
import re
from types import SimpleNamespace

import pytest
import yaml

from tests.test_layers import ROOT
from tools.docs_site import hooks

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
IN_DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*")) if path.is_file()]
PAGES = [*hooks.outside(), *(path for path in IN_DOCS if path.endswith(".md"))]
PLACES = {hooks.site_path(path): path for path in (*PAGES, *IN_DOCS, *hooks.copied())}


def in_menu(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [place for value in (entry.values() if isinstance(entry, dict) else entry) for place in in_menu(value)]


def test_the_menu_names_every_page_once():
    menu, pages = in_menu(CONFIG["nav"]), [hooks.site_path(path) for path in PAGES]
    assert not set(pages) - set(menu), f"add a line to nav in mkdocs.yml for {sorted(set(pages) - set(menu))}"
    assert not set(menu) - set(pages), f"no such page: {sorted(set(menu) - set(pages))}"
    assert len(menu) == len(set(menu))


def test_a_place_is_that_of_one_file():
    assert "install.md" in PLACES and "index.md" in PLACES
    for place, path in PLACES.items():
        if path in PAGES:
            assert hooks.in_repository(place) == path


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_the_same_page(path):
    place = hooks.site_path(path)
    text = hooks.text_of(path)
    moved = hooks.on_page_markdown(
        text, page=SimpleNamespace(file=SimpleNamespace(src_uri=place)), config=None, files=None
    )
    here, there = (re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", one) for one in (text, moved))
    assert len(here) == len(there)
    for old, new in zip(here, there, strict=True):
        if "://" not in old:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(place), new))
            wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), old))
            assert PLACES.get(target) == wanted, f"{path}: {old} became {new}"


def test_files_that_pages_link_to_are_copied():
    assert "examples/oasst/configs/oasst.yaml" in hooks.copied() and not set(hooks.copied()) & set(PAGES)


def test_a_notebook_becomes_a_page():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1\n"]}]},
    ]
    assert hooks.as_markdown({"cells": cells}) == "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```"


def test_versions_are_pinned_and_the_site_asks_no_other_server():
    lines = (ROOT / "tools/docs_site/constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert any(line.startswith("mkdocs-material==") for line in lines)
    assert CONFIG["theme"]["font"] is False and not {"extra_javascript", "offline"} & {*CONFIG, *CONFIG["plugins"]}
    assert CONFIG["extra_css"] == ["extra.css"] and (ROOT / "tools/docs_site/extra.css").is_file()
    assert "tools/docs_site/constraints.txt" in (ROOT / "Makefile").read_text()
