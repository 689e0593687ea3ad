"""`Sheet`: one table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.table import Table

from agents.files import write_atomically
from scripts.common import console


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn.

    Attributes:
        head: of the columns; the first is one of names, the others of figures.
        groups: heading -> rows; no heading where it is empty.
    """

    title: str
    head: tuple[str, ...]
    groups: Mapping[str, Sequence[Sequence[str]]]

    @classmethod
    def plain(cls, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Self:
        """One without headings."""
        return cls(title, tuple(head), {"": list(rows)})

    def to_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for index, heading in enumerate(self.head):
            table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for name, rows in self.groups.items():
            if name:
                table.add_row(name, style="italic")
            for row in rows:
                table.add_row(*row)
            table.add_section()
        return table

    def to_markdown(self) -> str:
        """With its title as a heading."""
        return f"### {self.title}\n\n{self.body()}"

    def body(self) -> str:
        """The table alone, in Markdown."""
        rules = ["---", *("---:" for _ in self.head[1:])]
        lines = [list(self.head), rules]
        for name, rows in self.groups.items():
            if name:
                lines.append([f"**{name}**", *("" for _ in self.head[1:])])
            lines += [list(row) for row in rows]
        return "\n".join(pipes(line) for line in lines)


def present(sheets: Sequence[Sheet], markdown: Path | None) -> None:
    """Print tables, and write them to the file `markdown` where there is one."""
    for sheet in sheets:
        console.print(sheet.to_rich())
    if markdown:
        write_atomically(markdown, "\n\n".join(sheet.to_markdown() for sheet in sheets).encode() + b"\n")


def with_ends(value: float, ends: Sequence[float], sign: str = "+") -> str:
    """A figure and its interval, in three digits after the point."""
    return f"{value:{sign}.3f} [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def pipes(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
