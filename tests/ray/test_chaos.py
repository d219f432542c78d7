"""A run is tormented as `python -m scripts.bench.chaos` does it, and keeps what docs/RELIABILITY.md promises.

Only what must hold is asserted, never how long it takes: every limit is as long as the test may run.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.bench.chaos.__main__ import parse, torment
from scripts.bench.chaos.report import Report
from scripts.bench.chaos.schedule import Fault, schedule

LIMIT_S = 550


def tormented(out: Path, policy_path: Path, faults: Sequence[Fault]) -> Report:
    small = ["actors.num_generators=1", f"policy.path={policy_path}", "env.name=tests.support.parity_domain:Parity"]
    args = parse([f"--out={out}", f"--faults={len(faults)}", f"--limit={LIMIT_S}", *small])
    report = torment(args, faults)
    assert report.broken == [], report.table()
    assert report.orphans == 0
    assert report.mlflow == "FINISHED"
    assert [outcome.fault for outcome in report.outcomes if outcome.survived] == list(faults)
    assert (out / "chaos" / "policy" / "model.safetensors").is_file()
    return report


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_minutes_of_chaos_from_a_fixed_seed(tiny_policy_path: Path, tmp_path: Path):
    """Of the seed's schedule, those that a run overcomes by itself: they need no new start."""
    faults = [fault for fault, _ in zip(schedule(4), range(30), strict=False) if not fault.ends_the_driver]
    chosen = [fault for fault in faults if fault.phase != "start" and fault.target != "disk"][:6]
    report = tormented(tmp_path / "chaos", tiny_policy_path, chosen)
    assert len({outcome.fault.name for outcome in report.outcomes}) == 6
    assert report.drivers == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_ends_the_driver_ends_in_words_and_the_run_goes_on(tiny_policy_path: Path, tmp_path: Path):
    """The raylet and the GCS are killed, and the disk fills up: nobody is left who could go on."""

    def fault(number: int, action: str, target: str, seconds: float = 0.0) -> Fault:
        return Fault(number=number, action=action, target=target, phase="", updates=4, seconds=seconds)  # type: ignore[arg-type]

    faults = [fault(1, "kill", "raylet"), fault(2, "kill", "gcs"), fault(3, "fill", "disk", 30.0)]
    report = tormented(tmp_path / "chaos", tiny_policy_path, faults)
    assert report.drivers >= 4
    assert all(outcome.resumed for outcome in report.outcomes[:2])
    terminals = [path.read_text() for path in sorted((tmp_path / "chaos" / "terminals").iterdir())]
    for text in terminals[:2]:
        assert "ended without a word" in text
        assert "Go on with it: trace-async train --resume" in text
    full = [text for text in terminals[2:] if "No space left on device" in text]
    assert full, "the disk was full, and nobody said so"
    assert all("trace-async train --resume" in text and "free some space there" in text.lower() for text in full)
