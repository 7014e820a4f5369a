"""The demo's output: the steps, answers that are right or wrong, a table at the end."""

from collections.abc import Sequence

from rich.text import Text

from megatron_ft.demo.answers import Answer
from megatron_ft.demo.verdict import Row
from megatron_ft.steps.screen import INDENT, Screen, shortened


class DemoScreen(Screen):
    """Prints answers and the verdict too."""

    def answers(self, shown: Sequence[Answer]) -> None:
        """Print questions with the model's answers."""
        width = max(len(answer.question) for answer in shown)
        for answer in shown:
            text = Text(f"{INDENT}{answer.question:{width}}  ->  {shortened(answer.text, 36):36}  ")
            text.append("right" if answer.right else "wrong", "green" if answer.right else "red")
            self.console.print(text)

    def table(self, rows: Sequence[Row]) -> None:
        """Print the verdict."""
        self.line(f"\n  {'RESULT':32}{'before':>10}{'after':>13}    required", "bold")
        for row in rows:
            text = Text(f"  {row.name:32}{row.before:>10}{row.after:>13}    {row.needed:13}")
            text.append("pass" if row.passed else "MISSED", "green" if row.passed else "bold red")
            self.console.print(text)
        for row in rows:
            if not row.passed:
                self.line(f"\n  {row.name}: {row.after}, required {row.needed}. Likely cause: {row.cause}.", "red")
        self.line()
