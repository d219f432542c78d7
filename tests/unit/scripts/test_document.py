from pathlib import Path

from scripts.comparison.document import (
    Block,
    Chart,
    Details,
    Heading,
    Paragraph,
    Table,
    to_html,
    to_markdown,
    write_document,
)

BLOCKS: list[Block] = [
    Heading("One <two>"),
    Paragraph("a & b\x1b[2J"),
    Table(["name", "value"], [["x|y", "1"], ["<b>", "2"]], best=frozenset({(1, 1)})),
    Chart("curve", "A curve", "<svg></svg>"),
    Details("All settings", "```\n<script>\n```"),
]


def test_markdown() -> None:
    assert to_markdown("T", BLOCKS) == (
        "# T\n\n## One &lt;two&gt;\n\na &amp; b\\x1b[2J\n\n"
        "| name | value |\n|---|---:|\n| x\\|y | 1 |\n| &lt;b&gt; | **2** |\n\n"
        "![A curve](curve.svg)\n\n*A curve*\n\nAll settings:\n\n    ```\n    <script>\n    ```\n"
    )


def test_html_escapes_all_but_the_charts() -> None:
    page = to_html("T", BLOCKS)
    assert "<h2>One &lt;two&gt;</h2><p>a &amp; b\\x1b[2J</p>" in page
    assert "<td>&lt;b&gt;</td><td class=best>2</td>" in page
    assert "<figure><svg></svg><figcaption>A curve</figcaption></figure>" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_a_document_is_page_markdown_and_charts(tmp_path: Path) -> None:
    page = write_document(tmp_path / "new", "T", BLOCKS)
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "report.md", "curve.svg"}
    assert (page.parent / "curve.svg").read_text() == "<svg></svg>\n"
