"""What broke down in environments is told once each, and counted."""

import logging

import pytest

from trace_async.tracking.faults import FaultBook
from trace_async.trees.tree import Fault

HANGS = {"step.env_timeout": Fault(2, "environment e, task 1: step() did not end within env.step_timeout_s=5")}


def test_a_kind_is_told_at_its_first_time_and_counted_every_time(caplog: pytest.LogCaptureFixture) -> None:
    book = FaultBook()
    assert (book.read(), book.example()) == ({}, "")
    with caplog.at_level(logging.WARNING, "trace_async.faults"):
        book.enter(HANGS)
        book.enter({"step.env_timeout": Fault(3, "environment e, task 2: …"), "init.env_error": Fault(1, "no sandbox")})
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "environment e, task 1: step() did not end within env.step_timeout_s=5",
        "no sandbox",
    ]
    assert book.example() == HANGS["step.env_timeout"].words
    assert book.read() == {"faults/step.env_timeout": 5.0, "faults/init.env_error": 1.0}
    assert book.read() == {}
