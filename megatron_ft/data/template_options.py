"""What a run gives to a tokenizer's own chat template, besides the chats."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from megatron_ft.errors import ConfigError, DataError


@dataclass(frozen=True)
class TemplateOptions:
    """date: what the template takes for today, ISO; None: it is refused where it asks. arguments: more variables. rewritten: what
    becomes of a chat whose earlier answers the template writes differently later: samples or one."""

    date: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rewritten: Literal["samples", "one"] = "samples"

    def now(self, form: str) -> str:
        """strftime_now of templates. Raise DataError without a date."""
        if self.date is None:
            raise DataError(
                f"the tokenizer's chat template asks for today's date, {form}, another in training than in use: fix it with --template_date"
            )
        try:
            return datetime.fromisoformat(self.date).strftime(form)
        except ValueError:
            raise ConfigError(f"--template_date {self.date}: give a date such as 2024-07-26") from None


def today() -> TemplateOptions:
    """Return options with today's date, for generation."""
    return TemplateOptions(datetime.now().isoformat())


def parse_arguments(entries: Sequence[str]) -> dict[str, Any]:
    """Return the variables of ["enable_thinking=false"]. Raise ConfigError for an entry that is not name=value."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template_arguments {entry}: write name=value, as in enable_thinking=false")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found
