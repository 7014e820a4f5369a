"""The HTML page: a heading, sections, tables. All text is escaped, except arguments named `html`."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_ft.files import atomic_file
from megatron_ft.report.curves import Line, picture
from megatron_ft.report.metrics import Metrics
from megatron_ft.report.style import STYLE


class Page:
    """Collects sections and writes them as one file."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(subtitle)}</p>' if subtitle else ""]

    def section(self, title: str, *html: str, note: str = "") -> None:
        """Add a section. note: a line of explanation below its title."""
        explanation = f'<p class="note">{escape(note)}</p>' if note else ""
        self.parts.append(f"<section><h2>{escape(title)}</h2>{explanation}{''.join(html)}</section>")

    def write(self, path: Path) -> None:
        with atomic_file(path, "w") as file:
            file.write(
                '<!doctype html><html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body><main>"
                f"{''.join(self.parts)}</main></body></html>\n"
            )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], classes: Sequence[str] = ()) -> str:
    """Return a table. classes: of each column ("num" aligns right, "code" is monospaced). Html cells are not escaped."""
    classes = [*classes, *[""] * (len(head) - len(classes))]

    def line(cells: Sequence[object], tag: str) -> str:
        return "".join(
            f'<{tag} class="{name}">{cell if isinstance(cell, Html) else escape(str(cell))}</{tag}>'
            for cell, name in zip(cells, classes)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


class Html(str):
    """Text that is HTML already."""


def badge(passed: bool, yes: str = "pass", no: str = "FAIL") -> Html:
    return Html(f'<b class="{"good" if passed else "bad"}">{yes if passed else no}</b>')


def commands(text: str) -> str:
    """Return terminal commands to copy."""
    return f"<pre>{escape(text)}</pre>"


def curves(metrics: Metrics) -> str:
    """Return figures of losses, learning rate, gradient norm and speed, with marks at checkpoints."""
    marks = sorted(metrics.checkpoints)
    tokens, trained = metrics.rate("train/tokens"), metrics.rate("train/supervised_tokens")
    pictures = (
        picture(
            "loss (nats per trained token)",
            [
                Line("training", metrics.curve("train/loss"), "a"),
                Line("validation", metrics.curve("eval/loss"), "b", dots=True),
            ],
            log=True,
            marks=marks,
        ),
        picture("learning rate", [Line("learning rate", metrics.curve("train/lr"), "a")]),
        picture("gradient norm, before clipping", [Line("norm", metrics.curve("train/grad_norm"), "a")], log=True),
        picture("tokens per second", [Line("all", tokens, "a"), Line("trained on", trained, "b")]),
        picture(
            "exact zeros in the MLPs (share)",
            [
                Line("training", metrics.curve("train/sparsity"), "a"),
                Line("validation", metrics.curve("eval/sparsity"), "b", dots=True),
            ],
        ),
    )
    return f'<div class="pictures">{"".join(pictures)}</div>'
