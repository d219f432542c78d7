"""docs/frameworks.md shows the programs that the tests run, and none other."""

import re

import pytest

from tests.support.paths import ROOT

PROGRAMS = sorted((ROOT / "docs" / "agents").glob("*.py"))
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_page_shows_the_program_that_is_tested(program):
    text = re.sub(r'^""".*?"""\n\n', "", program.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert f"```python\n{text}```\n" in PAGE
    assert f"`docs/agents/{program.name}`" in PAGE


def test_it_shows_nothing_else():
    assert PAGE.count("```python\n") == len(PROGRAMS) == 7
