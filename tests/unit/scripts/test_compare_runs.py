"""The comparison as a whole, with a fake trainer: runs, what was interrupted, figures and report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import cli
from scripts.commands.compare import keep, report_finished, run_cells, run_cells_on_cluster
from scripts.comparison.plan import load_comparison, read_figures, write_figures
from scripts.comparison.report import build_report, compared_budget, cut_curves
from scripts.comparison.runs import Plan
from tests.support.paths import CONFIGS, ROOT
from trace_async.config import ConfigError

FAKE = (sys.executable, str(ROOT / "tests" / "support" / "fake_trainer.py"))

SPEC = """
name: small
base: base.yaml
seeds: [0, 1]
max_generated_tokens: 1000
ours: trace
overrides: [budget.pool_size=32]
methods:
  grpo: {label: GRPO, overrides: [budget.stage1=uniform, budget.stage2=none, loss.advantage=grpo]}
  trace: {label: "TRACE <ours>", overrides: [budget.stage1=beta]}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def make_plan(tmp_path: Path, store: Path) -> Callable[..., Plan]:
    def make(*overrides: str, spec: str = SPEC) -> Plan:
        (tmp_path / "base.yaml").write_text(
            f"output_dir: {store}\nnum_updates: 1000\ntracking: {{uri: 'sqlite:///{store}/mlflow.db'}}\n"
        )
        (tmp_path / "compare.yaml").write_text(spec)
        comparison = load_comparison(tmp_path / "compare.yaml", [f"output_dir={tmp_path}", *overrides])
        return Plan(comparison, tmp_path / comparison.name)

    return make


def test_all_runs_are_made_once_and_reported(make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture) -> None:
    plan = make_plan()
    assert run_cells(plan, FAKE, parallel=2, limit_s=60) == []
    said = capsys.readouterr().out
    assert "0 of 4 runs are finished" in said
    assert "trace-s1: heldout/success_t1.0 0.260 →" in said
    assert [plan.status(cell) for cell in plan.cells()] == ["done"] * 4
    parents = {path.read_text().split()[-1] for path in (plan.folder / "logs").iterdir()}
    assert len(parents) == 1  # all runs name the same MLflow parent
    assert len(parents.pop()) == 32

    page = report_finished(plan, "trace-async compare compare.yaml")
    assert page is not None
    again = make_plan("seeds=[0,1,2]")
    assert run_cells(again, FAKE, parallel=1, limit_s=60) == []
    assert "4 of 6 runs are finished" in capsys.readouterr().out
    assert (plan.folder / "logs" / "grpo-s0.log").read_text().count("$ ") == 1


def test_kept_figures_are_gone_on_with(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    first = make_plan("seeds=[0]")
    assert run_cells(first, FAKE, parallel=2, limit_s=60) == []
    assert report_finished(first, "first") is not None
    keep(first.folder, tmp_path / "kept")
    settings = tmp_path / "kept" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"machine": "2 × another"}))

    # The same settings for GRPO, others for TRACE: GRPO's run is taken, the three others are made.
    more = make_plan("seeds=[0,1]", "name=more", spec=SPEC.replace("stage1=beta", "stage1=point"))
    assert more.take(tmp_path / "kept") == 1
    assert {cell.name: more.status(cell) for cell in more.cells()} == {
        "grpo-s0": "done",
        "trace-s0": "new",
        "grpo-s1": "new",
        "trace-s1": "new",
    }
    assert run_cells(more, FAKE, parallel=2, limit_s=60) == []
    assert not (more.folder / "logs" / "grpo-s0.log").exists()
    report_finished(more, "more")
    before, after = read_figures(first.folder), read_figures(more.folder)
    assert after.of("grpo")[0] == before.of("grpo")[0]
    assert len(after.runs) == 4
    assert after.wall_s["grpo-s0"] == before.wall_s["grpo-s0"]
    assert after.machine.split("; ") == ["2 × another", before.machine]

    keep(more.folder, tmp_path / "kept")
    with pytest.raises(ConfigError, match="grpo-s1, trace-s1 kept there would be lost"):
        keep(first.folder, tmp_path / "kept")
    assert len(read_figures(tmp_path / "kept").runs) == 4


@pytest.mark.slow
def test_on_a_cluster_ray_tune_places_the_runs(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("seeds=[0]")
    monkeypatch.setenv("FAKE_TRAINER_DIES", "trace-s0")
    assert run_cells_on_cluster(plan, FAKE, "local", cpus=1, limit_s=60) == ["trace-s0"]
    assert run_cells_on_cluster(plan, FAKE, "local", cpus=1, limit_s=60) == []
    assert [plan.status(cell) for cell in plan.cells()] == ["done", "done"]
    assert run_cells_on_cluster(plan, FAKE, "nowhere:1", cpus=1, limit_s=60) == []  # nothing to do, no cluster asked


def test_what_died_is_told_and_resumed(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("seeds=[0]")
    monkeypatch.setenv("FAKE_TRAINER_DIES", "trace-s0")
    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == ["trace-s0"]
    assert {cell.name: plan.status(cell) for cell in plan.cells()} == {"grpo-s0": "done", "trace-s0": "begun"}
    report_finished(plan, "again")
    assert "Not finished, and left out: trace seed 0." in (plan.folder / "report.md").read_text()

    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == []
    log = (plan.folder / "logs" / "trace-s0.log").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("$")] == ["--config", "--resume"]
    report_finished(plan, "again")
    (run,) = read_figures(plan.folder).of("trace")
    assert [row["step"] for row in run.rows] == list(range(12))


def test_a_run_that_hangs_is_stopped(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("seeds=[0]")
    monkeypatch.setenv("FAKE_TRAINER_HANGS", "grpo-s0")
    assert run_cells(plan, FAKE, parallel=1, limit_s=15) == ["grpo-s0"]
    assert {cell.name: plan.status(cell) for cell in plan.cells()} == {"grpo-s0": "begun", "trace-s0": "done"}


def test_the_first_run_goes_alone_only_where_it_builds_the_start_policy(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRAINER_WAITS", "grpo-s0 trace-s0")
    alone = make_plan("seeds=[0]", "name=alone")
    assert run_cells(alone, FAKE, parallel=2, limit_s=15) == ["grpo-s0"]
    given = make_plan("seeds=[0]", "overrides=[policy.path=/given]")
    assert run_cells(given, FAKE, parallel=2, limit_s=60) == []


def test_a_run_of_other_settings_is_not_taken_for_this_one(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("seeds=[0]")
    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == []
    changed = make_plan("seeds=[0]", spec=SPEC.replace("stage1=beta", "stage1=point"))
    with pytest.raises(ConfigError, match="trace-s0 was run with other settings"):
        run_cells(changed, FAKE, parallel=1, limit_s=60)


def test_some_of_the_methods(make_plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    comparison = make_plan().comparison
    assert comparison.only(["trace"]).baseline == "trace"
    assert comparison.only(["grpo"]).ours == ""
    assert comparison.only(["trace", "grpo"]).baseline == "grpo"
    file = str(tmp_path / "compare.yaml")
    assert cli.main(["compare", file, "--dry-run", "--methods", "trace", f"output_dir={tmp_path}"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["trace-s0", "trace-s1"]
    assert cli.main(["compare", file, "--dry-run", "--methods", "trace,ppo"]) == 2
    assert "comparison small has no method ppo: grpo, trace" in capsys.readouterr().err


def test_nothing_finished_gives_no_report(make_plan: Callable[..., Plan]) -> None:
    assert report_finished(make_plan(), "x") is None


class Tables(HTMLParser):
    """The rows of all tables of a page, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_report_says_what_the_figures_say(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan()
    run_cells(plan, FAKE, parallel=2, limit_s=60)
    page = report_finished(plan, "trace-async compare compare.yaml")
    assert page is not None
    text = page.read_text()
    tables = Tables()
    tables.feed(text)
    # At 1000 tokens: .25 + .01·seed + gain, the gain .2 for GRPO and .4 for TRACE; mean height half way up.
    assert ["GRPO", "2", "45.5% [45.0%, 46.0%]", "35.5% [35.0%, 36.0%]", "1,000 (100%)"] in tables.rows
    assert ["TRACE <ours>", "2", "65.5% [65.0%, 66.0%]", "45.5% [45.0%, 46.0%]", "500 (50%)"] in tables.rows
    assert ["ReAct (no training)", "", "25.5%", "", ""] in tables.rows
    difference = "+20.0 [+20.0, +20.0] (+20.0, +20.0)"
    assert ["TRACE <ours>", "2", difference, "+10.0 [+10.0, +10.0] (+10.0, +10.0)"] in tables.rows
    assert ["TRACE <ours>", "budget.stage1=beta"] in tables.rows
    assert not tables.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|(?<!xmlns=\")https?://", text)
    assert "trace-async compare compare.yaml" in text
    assert "pool_size: 32" in text

    # Kept figures make the same report anywhere, and the Markdown finds its charts.
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("figures.csv", "settings.json"):
        shutil.copy(plan.folder / name, kept)
    figures = read_figures(kept)
    assert build_report(figures, "c") == build_report(read_figures(plan.folder), "c")
    assert cut_curves(figures, "trace", "heldout/success_t1.0", compared_budget(figures))[1].value[-1] == pytest.approx(
        0.66
    )
    write_figures(tmp_path / "copy", figures)
    assert (tmp_path / "copy" / "figures.csv").read_bytes() == (kept / "figures.csv").read_bytes()
    markdown = (plan.folder / "report.md").read_text()
    charts = re.findall(r"\]\((\w+\.svg)\)", markdown)
    assert len(charts) == 6
    assert all((plan.folder / chart).is_file() for chart in charts)
    assert "| TRACE &lt;ours&gt; | 2 | **65.5% [65.0%, 66.0%]** |" in markdown
    # Both tables of differences: 20 points more, in each seed.
    assert "| TRACE &lt;ours&gt; | 2 | +20.0 [+20.0, +20.0] (+20.0, +20.0) |" in markdown
    assert "| TRACE &lt;ours&gt; less the other, paired, points |" in markdown
    assert "| GRPO | 2 | +20.0 [+20.0, +20.0] (+20.0, +20.0) |" in markdown


@pytest.mark.parametrize(
    "name",
    [
        "multihop",
        "multihop_tuned",
        "easy_regime",
        "scarce",
        "oracle",
        "ablation",
        "math",
        "functions",
    ],
)
def test_the_comparisons_that_come_with_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    configs = CONFIGS
    assert cli.main(["compare", str(configs / f"compare/{name}.yaml"), "--dry-run", "seeds=[7]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    comparison = load_comparison(configs / f"compare/{name}.yaml")
    assert len(lines) == len(comparison.methods) >= 3
    assert all(line.startswith("new ") and " seed=7 " in line for line in lines)
    for method in comparison.methods:
        budget = comparison.run_config(method, 0).budget
        cost = budget.root_rollouts * (1 + budget.continuations_per_root / 2)
        assert cost == (64 if method == "shape_half_2" else 128)


def test_the_comparison_of_engines_differs_in_nothing_but_the_engine() -> None:
    comparison = load_comparison(CONFIGS / "compare/engines.yaml")
    runs = {method: comparison.run_config(method, 1) for method in comparison.methods}
    assert {method: config.engine.backend for method, config in runs.items()} == {m: m for m in runs}
    assert set(runs) == {"torch", "sglang", "vllm"}
    for config in runs.values():
        assert replace(config, engine=replace(config.engine, backend="torch")) == runs["torch"]


def test_what_is_no_setting_of_the_comparison_holds_for_every_run(make_plan: Callable[..., Plan]) -> None:
    comparison = make_plan("seeds=[3]", "budget.pool_size=48", "eval.num_tasks=7").comparison
    assert comparison.seeds == [3]
    for method, stage1 in (("grpo", "uniform"), ("trace", "beta")):
        config = comparison.run_config(method, 3)
        assert (config.budget.pool_size, config.eval.num_tasks, config.budget.stage1) == (48, 7, stage1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline=ppo", "baseline=ppo: not among the methods"),
        ("ours=ppo", "ours=ppo: not among the methods"),
        ("seeds=[1,1]", "distinct, one or more"),
        ("seeds=[]", "distinct, one or more"),
        ("max_generated_tokens=0", "must be > 0"),
        ("max_generated_token=5", "max_generated_token"),
        ("name=a/b", "letters, digits"),
        ("seed=1", r"seeds=\[0,1,2\]"),
        ("overrides=[eval.temperatures=[1.0]]", "did not find expected"),
        ("methods.bad.overrides=[budget.stage1=best]", "(?s)method bad: .*stage1"),
    ],
)
def test_a_wrong_comparison_is_refused(make_plan: Callable[..., Plan], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(override)


def test_a_broken_file_of_figures_is_named(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("seeds=[0]")
    run_cells(plan, FAKE, parallel=1, limit_s=60)
    report_finished(plan, "x")
    path = plan.folder / "figures.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace("0.", "zero.", 1), *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"figures\.csv:4: not a row of figures"):
        read_figures(plan.folder)


SCRIPT = """
import sys
from pathlib import Path
from scripts.commands.compare import run_cells
from scripts.comparison.runs import Plan
from scripts.comparison.plan import load_comparison
folder = sys.argv[1]
comparison = load_comparison(folder + "/compare.yaml", [f"output_dir={folder}", "seeds=[0]"])
run_cells(Plan(comparison, Path(folder) / "small"), sys.argv[2:], parallel=1, limit_s=60)
"""


def begun_by_a_process(plan: Plan) -> subprocess.Popen:
    """A comparison in a process of its own, whose first run has begun (and hangs)."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(plan.folder.parent), *FAKE])
    while not (plan.run_dir(plan.cells()[0]) / "config.yaml").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    return process


def test_ended_from_outside_it_stops_its_runs_and_can_go_on(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("seeds=[0]")
    monkeypatch.setenv("FAKE_TRAINER_HANGS", "grpo-s0")
    process = begun_by_a_process(plan)
    process.terminate()
    assert process.wait(30) != 0
    assert plan.status(plan.cells()[0]) == "begun"
    assert "KeyboardInterrupt" in (plan.folder / "logs" / "grpo-s0.log").read_text()
    monkeypatch.delenv("FAKE_TRAINER_HANGS")
    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == []


def test_a_run_left_behind_by_a_killed_command_is_not_started_twice(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan("seeds=[0]")
    monkeypatch.setenv("FAKE_TRAINER_HANGS", "grpo-s0")
    process = begun_by_a_process(plan)
    process.kill()
    process.wait(30)
    monkeypatch.delenv("FAKE_TRAINER_HANGS")
    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == ["grpo-s0"]
    assert "grpo-s0: still running, started by an earlier command" in capsys.readouterr().out
    log = plan.folder / "logs" / "grpo-s0.log"
    os.kill(int(re.search(r"process (\d+)", log.read_text()).group(1)), signal.SIGKILL)
    assert run_cells(plan, FAKE, parallel=1, limit_s=60) == []


def test_words_that_are_no_settings_are_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    make_plan()
    for words in (["--dry-run", "seeds"], ["--dry-runs"]):
        with pytest.raises(SystemExit) as refused:
            cli.main(["compare", str(tmp_path / "compare.yaml"), *words])
        assert refused.value.code == 2
