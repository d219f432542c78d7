"""`trace-async scale` and `status` on a run's folder."""

from pathlib import Path

import pytest

from scripts import cli
from trace_async.config import config_to_yaml, load_config
from trace_async.run.scaling import Size, keep_sizes, ordered
from trace_async.run.session import at_work


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(config_to_yaml(load_config(None, ["num_updates=9"])))
    return tmp_path


def test_a_run_under_way_is_scaled_and_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    with at_work(run_dir):
        assert cli.main(["scale", str(run_dir), "3"]) == 0
        keep_sizes(run_dir, [Size(num_generators=3, reason="asked for", update=4)])
        assert cli.main(["status", str(run_dir)]) == 0
    assert ordered(run_dir) == 3
    said = capsys.readouterr().out
    assert "works on it" in said
    assert "after update 4: 3 generators, asked for" in said


def test_a_run_that_is_not_under_way_is_refused_in_words(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["scale", str(run_dir), "3"]) == 2
    assert "no process works on this run" in capsys.readouterr().err
    assert cli.main(["scale", str(run_dir), "0"]) == 2
    assert cli.main(["status", str(run_dir / "nowhere")]) == 2
    assert cli.main(["status", str(run_dir)]) == 0
    assert "no process works on it" in capsys.readouterr().out
