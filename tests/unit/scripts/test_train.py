"""`train` checks what `--dry-run` checks before it starts anything."""

from pathlib import Path

import pytest

from scripts.cli import main
from trace_async.types import Split, Task

PARITY = "env.name=tests.support.parity_domain:Parity"


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["train", "dry run"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learner.max_tokens_per_micro_batch=64", "must fit into one micro-batch"),
        ("env.name=tests.unit.scripts.test_train:NothingHeldOut", "there are no heldout tasks"),
    ],
)
def test_what_the_dry_run_refuses_is_refused_before_anything_starts(
    dry_run: list[str], setting: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *dry_run, PARITY, setting, f"output_dir={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class NothingHeldOut:
    name = "nothing held out"

    def tasks(self, split: Split) -> list[Task]:
        return [Task(id="t", domain=self.name, kind="k", data={})] if split == "train" else []
