"""A small report as blocks, written as one self-contained HTML page and as Markdown with its charts beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trace_async.printable import printable
from trace_async.tracking.log import write_whole


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """The first column holds names, the others figures. `best`: (row, column) of cells to stress."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Chart:
    """`name`: of the SVG file beside the Markdown. `svg` is trusted markup of ours."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Details:
    """Long plain text, folded away."""

    summary: str
    text: str


Block = Heading | Paragraph | Table | Chart | Details

STYLE = """
body { margin: 0; padding: 28px; font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #f6f7f9; }
main { max-width: 1120px; margin: 0 auto; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 34px 0 8px; }
p { margin: 6px 0 10px; max-width: 90ch; } figure { margin: 12px 0; } figcaption { color: #5b6473; font-size: 13px; }
svg { max-width: 100%; height: auto; border: 1px solid #dde1e8; border-radius: 8px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; background: #fff; font-size: 13.5px; }
th, td { border: 1px solid #dde1e8; padding: 5px 10px; text-align: right; vertical-align: top; }
th { background: #eef1f5; font-weight: 600; } td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
details { margin: 8px 0; } summary { cursor: pointer; }
pre { background: #fff; border: 1px solid #dde1e8; border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: 12px; }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that loads nothing and runs nothing."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_html(title)}</title><style>{STYLE}</style></head><body><main><h1>{_html(title)}</h1>"
        f"{''.join(map(_html_block, blocks))}</main></body></html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Charts are referred to as `<name>.svg` beside the file."""
    return "\n\n".join([f"# {_line(title)}", *map(_markdown_block, blocks)]) + "\n"


def write_document(folder: str | Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write `report.html`, `report.md` and the charts as SVG files. Returns the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Chart):
            write_whole(folder / f"{block.name}.svg", block.svg + "\n")
    write_whole(folder / "report.md", to_markdown(title, blocks))
    write_whole(folder / "report.html", to_html(title, blocks))
    return folder / "report.html"


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_html(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Chart(_, caption, svg):
            return f"<figure>{svg}<figcaption>{_html(caption)}</figcaption></figure>"
        case Details(summary, text):
            return f"<details><summary>{_html(summary)}</summary><pre>{_html(text)}</pre></details>"
        case Table(header, rows, best):
            head = "".join(f"<th>{_html(cell)}</th>" for cell in header)
            body = "".join(
                "<tr>"
                + "".join(
                    f"<td{' class=best' if (r, c) in best else ''}>{_html(cell)}</td>" for c, cell in enumerate(row)
                )
                + "</tr>"
                for r, row in enumerate(rows)
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_line(text)}"
        case Paragraph(text):
            return _line(text)
        case Chart(name, caption, _):
            return f"![{_line(caption)}]({name}.svg)\n\n*{_line(caption)}*"
        case Details(summary, text):
            # Indented code ends at no fence that the text might hold.
            body = "\n".join(f"    {line}" for line in printable(text).split("\n"))
            return f"{_line(summary)}:\n\n{body}"
        case Table(header, rows, best):
            lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
            for r, row in enumerate(rows):
                lines.append(_row([f"**{_line(cell)}**" if (r, c) in best else cell for c, cell in enumerate(row)]))
            return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _line(text: str) -> str:
    return escape(printable(text).replace("\n", " "), quote=False)


def _html(text: str) -> str:
    return escape(printable(text))
