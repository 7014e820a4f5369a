"""The HTML page of `megatron-ft inspect`: one file without external resources."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ft.data.show import Token

from megatron_ft.data.roles import display_name
from megatron_ft.wording import counted

STYLE = """body{font:15px/1.6 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#222}
.sample{white-space:pre-wrap;font:14px/1.9 ui-monospace,monospace;border:1px solid #ddd;border-radius:6px;padding:.8rem}
.t{border-right:1px solid #0002;padding:1px 0}.system{background:#fdf3d8}.prompter{background:#dcebfb}
.assistant{background:#ddf5e3}.context{background:#ececec}.on{border-bottom:2px solid #1a7f37}.c{font-weight:600}
.m{border-top:2px solid #b35900}.row{display:flex;height:2rem;margin:.5rem 0}.row span{overflow:hidden;font-size:.75rem;
padding:.4rem .2rem;border-right:2px solid #fff}.row span:nth-child(odd){background:#bcd9f5}.row span:nth-child(even)
{background:#d9e8c5}.row .pad{background:#f3f3f3!important;color:#888}h2{font-size:1rem;margin-top:1.6rem}"""
LEGEND = (
    '<p><span class="system">system</span> <span class="prompter">user</span> <span class="assistant">assistant</span> '
    '<span class="context">context or text</span> <span class="on">trained on</span> <span class="m">marked</span>; '
    "a line between tokens; hover for id, role and weight</p>"
)


def page(title: str, head: list[str], samples: list, row: list | None) -> str:
    """Return the page. samples: (number, source, tokens). row: (sample, first position, end, tokens cut off) each, or None."""
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in head), LEGEND]
    if row is not None:
        parts += ["<h2>A packed row</h2>", _row(row)]
    for number, source, tokens in samples:
        trained = sum(token.weight > 0 for token in tokens)
        parts.append(
            f"<h2>sample {number}, {escape(source)}: {counted(len(tokens), 'token')}, {trained} trained on</h2>"
        )
        parts.append(f'<div class="sample">{"".join(map(_token, tokens))}</div>')
    start = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>\n"
    return start + "\n".join(parts) + "\n"


def _token(token: Token) -> str:
    kinds = ["t", token.role]
    kinds += [name for name, yes in (("on", token.weight > 0), ("c", token.control), ("m", token.marked)) if yes]
    text = str(token.id) if token.text is None else token.text
    shown = escape(text).replace("\n", "⏎\n")
    details = f"id {token.id}{_part(token)}, {display_name(token.role)}, weight {token.weight:g}"
    return f'<span class="{" ".join(kinds)}" title="{details}">{shown}</span>'


def _part(token: Token) -> str:
    """Return what a token is that adds no text: a part of the character that follows."""
    return f" {escape(token.piece or '')}" if token.text == "" else ""


def _cut(tokens: int) -> str:
    return f", last {counted(tokens, 'token')} cut" if tokens else ""


def _row(row: list) -> str:
    whole = max(1, row[-1][2])
    spans = "".join(
        f'<span style="width:{100 * (end - start) / whole:.3f}%" title="positions {start} to {end - 1}'
        f'{_cut(cut)}">{sample}</span>'
        for sample, start, end, cut in row
    )
    return f'<div class="row">{spans}</div>'
