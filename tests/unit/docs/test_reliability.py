"""docs/RELIABILITY.md promises nothing that no test holds: every row of a `held by` table names tests that exist."""

import re

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:unit|ray|servers)/[\w/]+\.py)`")


def held_rows() -> list[str]:
    """The rows of all tables whose last column is `held by`, without their head and ruler."""
    rows, in_table = [], False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            in_table = False
        elif line.rstrip().endswith("| held by |"):
            in_table = True
        elif in_table and set(line) - set("|-: "):
            rows.append(line)
    return rows


def test_every_promise_names_a_test():
    rows = held_rows()
    assert rows
    assert [row for row in rows if not NAMED.search(row.rstrip().rstrip("|").rsplit("|", 1)[-1])] == []


def test_every_test_named_there_exists_and_holds_a_test():
    named = sorted(set(NAMED.findall(PAGE)))
    assert named
    missing = [name for name in named if not (ROOT / "tests" / name).is_file()]
    assert missing == []
    empty = [
        name
        for name in named
        if not re.search(r"^\s*(async )?def test_", (ROOT / "tests" / name).read_text(encoding="utf-8"), re.M)
    ]
    assert empty == []
