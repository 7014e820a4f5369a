"""Shows what an import has found: the commands, and three lists of what became of each key."""

from __future__ import annotations

from megatron_ft.importing.job import Job


def page(job: Job, lines: list[str], path: str) -> str:
    """Return the page, of which everything but the commands is a comment: the output is a script."""
    parts = [
        f"# {path}: {job.tool}. {len(job.taken)} taken, {sum(map(len, job.ignored.values()))} ignored, {len(job.impossible)} impossible"
    ]
    parts += ["", *(lines or [f"# no commands: {job.unfit}"]), ""]
    parts += _section("before you run them", [(text, "") for text in dict.fromkeys(job.before)])
    parts += _section("taken", list(dict.fromkeys(job.taken)), " -> ")
    grouped = [(", ".join(names), why) for why, names in job.ignored.items()]
    parts += _section("ignored", grouped, ": ")
    parts += _section("impossible", job.impossible, ": ")
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, rows: list[tuple[str, str]], between: str = "") -> list[str]:
    if not rows:
        return []
    return [f"# {title}", *(f"#   {first}{between if second else ''}{second}" for first, second in rows), ""]


def as_data(job: Job, lines: list[str]) -> dict:
    """Return the same for --json."""
    return {
        "tool": job.tool,
        "commands": lines,
        "before": list(dict.fromkeys(job.before)),
        "taken": [{"there": there, "here": here} for there, here in dict.fromkeys(job.taken)],
        "ignored": [{"there": name, "why": why} for why, names in job.ignored.items() for name in names],
        "impossible": [{"there": there, "why": why} for there, why in job.impossible],
    }
