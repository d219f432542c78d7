"""Chaos: its schedule follows from the seed, it finds what it looks for, and its disk is full when it says so."""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts.bench.chaos.disk import Disk
from scripts.bench.chaos.environment import Misbehaving
from scripts.bench.chaos.inject import Outcome
from scripts.bench.chaos.processes import Sample, as_csv, marked, marking, role_of, sample, with_role
from scripts.bench.chaos.report import Report, soak_charts
from scripts.bench.chaos.schedule import PHASES, TARGETS, Fault, schedule

COMBINATIONS = {(action, target) for action, targets in TARGETS.items() for target in targets}


def first(seed: int, count: int) -> list[Fault]:
    return list(itertools.islice(schedule(seed), count))


def test_the_schedule_is_a_function_of_the_seed_and_meets_every_fault_before_one_comes_again():
    assert first(1, 40) == first(1, 40)
    assert first(1, 40) != first(2, 40)
    length = len(COMBINATIONS)
    for seed in range(20):
        faults = first(seed, 2 * length)
        assert [fault.number for fault in faults] == list(range(1, 2 * length + 1))
        for deck in (faults[:length], faults[length:]):
            assert {(fault.action, fault.target) for fault in deck} == COMBINATIONS
        assert all(fault.phase in PHASES and (fault.action == "kill" or not fault.phase) for fault in faults)
        assert all((fault.seconds > 0) == (fault.action in ("hang", "slow", "fill")) for fault in faults)


def test_what_ends_the_driver():
    ends = {fault.name for fault in first(0, len(COMBINATIONS)) if fault.ends_the_driver}
    assert ends == {"kill driver", "kill raylet", "kill gcs", "stop driver"}


def test_a_process_is_found_by_its_mark_when_its_parent_is_gone():
    mark = f"test-{time.time_ns()}"
    code = "import subprocess; no = subprocess.DEVNULL; "
    code += "print(subprocess.Popen(['sleep', '600'], stdout=no, stderr=no).pid)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=marking(mark), capture_output=True, text=True, check=True, timeout=60
    )
    orphan = psutil.Process(int(done.stdout))
    try:
        assert [process.pid for process in marked(mark)] == [orphan.pid]
        assert role_of(orphan) == "other"
        assert with_role(mark, "generator") == []
        seen = sample(orphan, 1.25)
        assert seen is not None
        assert (seen.pid, seen.role, seen.seconds, seen.threads) == (orphan.pid, "other", 1.2, 1)
        assert seen.files >= 1
        assert as_csv([seen]).splitlines()[0].startswith("seconds,role,pid,memory_mib")
    finally:
        orphan.kill()
    while marked(mark):
        time.sleep(0.01)
    assert sample(orphan, 2.0) is None


def test_a_process_that_ended_and_was_not_collected_has_no_role():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        process = psutil.Process(ended.pid)
        while process.status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its exit status
            time.sleep(0.01)
        with pytest.raises(psutil.ZombieProcess):
            process.cmdline()
        assert role_of(process) == "other"
    assert role_of(process) == "other"


WRITER = """
import sys
from pathlib import Path
print("ready", flush=True)
for line in sys.stdin:
    try:
        with Path(sys.argv[1]).open("ab") as file:
            file.write(b"x" * 5000)
        print("written", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("mounts", [True, False])
def test_nothing_can_be_written_to_a_disk_that_is_full_until_it_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: bool
):
    """Where nothing can be mounted, a limit of the writing process stands in."""
    if not mounts:
        monkeypatch.setattr("scripts.bench.chaos.disk.shutil.which", lambda name: None)
    disk = Disk(tmp_path / "disk", megabytes=1)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(disk.folder / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None

    def try_it() -> str:
        writer.stdin.write("now\n")
        writer.stdin.flush()
        return writer.stdout.readline().strip()

    def writers() -> list[psutil.Process]:
        return [psutil.Process(writer.pid)]

    try:
        assert writer.stdout.readline() == "ready\n"
        assert try_it() == "written"
        disk.fill(writers)
        assert try_it() == "OSError"
        disk.free(writers)
        assert try_it() == "written"
    finally:
        writer.kill()
        writer.wait()
        disk.close(tmp_path / "kept")
    assert (tmp_path / "kept" / "file").stat().st_size >= 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


async def test_an_environment_that_misbehaves_raises_and_hangs_and_otherwise_is_the_one_inside():
    env = {"name": "envs.example:GuessNumber", "args": {"max_turns": 1}}
    tame = Misbehaving(env=env, share=0.0)
    task = tame.tasks("train")[0]
    assert task.id == "train-1"
    inside = tame.make_env(task)
    await inside.init()
    assert (await (await inside.fork()).step("guess 1")).reward == 1.0
    wild = Misbehaving(env=env, share=1.0, seed=3)
    seen = set()
    for _ in range(20):
        try:
            await asyncio.wait_for(wild.make_env(task).init(), 0.01)
        except (RuntimeError, TimeoutError) as error:
            seen.add(type(error))
    assert seen == {RuntimeError, TimeoutError}


def test_the_report_counts_by_fault_and_names_what_was_broken():
    kill = Fault(number=1, action="kill", target="generator", phase="eval", updates=1, seconds=0.0)
    outcomes = [
        Outcome(fault=kill, at=0.0, phases=("eval",), survived=True, recovered_s=4.0),
        Outcome(fault=kill, at=9.0, phases=("eval", "stage1"), survived=True, resumed=True, recovered_s=8.0),
        Outcome(fault=kill, at=20.0),
    ]
    report = Report(
        seed=1,
        minutes=2.0,
        outcomes=outcomes,
        drivers=2,
        updates=30,
        ledger={"allocated": {"root": 7, "continuation": 3}, "trained": {"root": 10}, "failed": {}, "filtered": {}},
        environment={"step.env_error": 2.0},
        orphans=1,
        mlflow="FINISHED",
        broken=["driver 1 left behind: raylet 5"],
    )
    lines = report.table().splitlines()
    assert lines[1].split() == ["kill", "generator", "3", "2", "1", "6.0", "8.0", "eval", "2,", "stage1", "1"]
    assert "ledger: 10 allocated, 10 trained" in report.table()
    assert lines[-1] == "BROKEN: driver 1 left behind: raylet 5"
    kept = json.loads(json.dumps(report.as_json()))
    assert kept["outcomes"][1] == {
        **{"number": 1, "action": "kill", "target": "generator", "phase": "eval", "updates": 1, "seconds": 0.0},
        **{"at": 9.0, "phases": ["eval", "stage1"], "survived": True, "resumed": True, "recovered_s": 8.0},
    }


def test_a_soak_draws_what_was_there_most_of_the_time():
    def seen(seconds: float, role: str, pid: int) -> Sample:
        return Sample(seconds, role, pid, 100.0 + seconds, 1.0, 5, 20, 3)

    samples = [seen(5.0 * n, "generator", 10) for n in range(1, 7)] + [seen(5.0, "prompts", 11), seen(5.0, "other", 12)]
    charts = soak_charts(samples)
    assert set(charts) == {"memory_mib", "shared_mib", "threads", "files", "sockets"}
    assert "generator 10" in charts["memory_mib"]
    assert "prompts" not in charts["memory_mib"]
    assert soak_charts([]) == {}
