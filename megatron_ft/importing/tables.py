"""Looks up the keys of another tool in tables: taken as they are, computed, ignored with a reason, impossible with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from megatron_ft.config.hints import nearest
from megatron_ft.importing.job import Job, is_off

Handler = Callable[[Job, str, Any], None]
Groups = tuple[tuple[str, str], ...]
"""(Reason, names)."""


class Table(NamedTuple):
    """The keys of a tool. direct: key -> flag of finetune that means the same. computed: key -> what to do with it.

    off: names that say nothing where their value is one of these.
    beginnings: (reason, beginnings of names that are impossible). ignored_beginnings: of names that are ignored.
    """

    direct: Mapping[str, str]
    computed: Mapping[str, Handler]
    ignored: Groups
    impossible: Groups
    off: Mapping[str, tuple[Any, ...]] = {}
    beginnings: Groups = ()
    ignored_beginnings: Groups = ()

    def names(self) -> set[str]:
        grouped = (name for _, names in (*self.ignored, *self.impossible) for name in names.split())
        return {*self.direct, *self.computed, *grouped}

    def knows(self, key: str) -> bool:
        return key in self.names() or bool(_begins(key, (*self.beginnings, *self.ignored_beginnings)))


OFF = "off or empty there"


def read(job: Job, values: Mapping[str, Any], tables: Iterable[Table]) -> None:
    """Give every key of a file to the first table that knows it, and list keys that none knows."""
    tables = list(tables)
    order = [key for table in tables for key in table.computed]
    for key in sorted(values, key=lambda one: order.index(one) if one in order else len(order)):
        table = next((one for one in tables if one.knows(key)), None)
        if table is None:
            names = sorted({name for one in tables for name in one.names()})
            job.refuse(key, values[key], f"{job.tool} has no key of this name that is known here{nearest(key, names)}")
        else:
            _one(job, key, values[key], table)


def _one(job: Job, key: str, value: Any, table: Table) -> None:
    if value is None or value == "" or (isinstance(value, list | dict) and not value):
        if key not in job.defaults:
            job.ignore(key, value, OFF)
    elif key in table.computed:
        table.computed[key](job, key, value)
    elif key in table.direct:
        job.set(key, value, table.direct[key], value)
    else:
        _grouped(job, key, value, table)


def _grouped(job: Job, key: str, value: Any, table: Table) -> None:
    if why := _reason(key, table.ignored) or _begins(key, table.ignored_beginnings):
        job.ignore(key, value, OFF if is_off(value) else why)
        return
    why = _reason(key, table.impossible) or _begins(key, table.beginnings) or ""
    if is_off(value) or value in table.off.get(key, ()) or (isinstance(value, int | float) and value == 0):
        job.ignore(key, value, OFF)
    else:
        job.refuse(key, value, why)


def _begins(key: str, groups: Groups) -> str | None:
    return next((reason for reason, starts in groups if key.startswith(tuple(starts.split()))), None)


def _reason(key: str, groups: Groups) -> str | None:
    return next((reason for reason, names in groups if key in names.split()), None)
