"""`trace-async compare configs/compare/multihop.yaml`: methods × seeds at equal generated tokens, with a report.

Each run is a `trace-async train` of its own. Interrupted at any moment, the same command goes on: finished runs are
skipped, a run that had begun is resumed. A folder of kept figures in place of the YAML makes its report anew; with
`--kept` a comparison goes on from there, with more seeds or methods.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from scripts.comparison.document import Block, Chart, Paragraph, to_markdown, write_document
from scripts.comparison.plan import (
    FIGURES_FILE,
    SETTINGS_FILE,
    Figures,
    RunFigures,
    load_comparison,
    read_figures,
    read_settings,
    run_figures,
    write_figures,
)
from scripts.comparison.report import build_report, compared_budget, cut_curves
from scripts.comparison.runs import Cell, Plan
from trace_async.config import ConfigError
from trace_async.tracking.log import read_metrics, write_whole
from trace_async.tracking.mlflow_tracker import saved_run_id, tracking_uri
from trace_async.tracking.run_log import RunLog

TRAINER = (sys.executable, "-m", "scripts.cli", "train")
STOP_LIMIT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("comparison", type=Path, help="YAML file, or a folder with kept figures")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="so many runs at a time on this machine")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="side by side on this Ray cluster with a shared disk")
    parser.add_argument("--cpus-per-run", type=float, default=4.0, help="cores that a run takes on the cluster")
    parser.add_argument("--minutes-per-run", type=float, default=60.0, help="a run that takes longer is stopped")
    parser.add_argument("--report-only", action="store_true", help="start nothing; report what is finished")
    parser.add_argument("--dry-run", action="store_true", help="check every config and print the runs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy report and figures there, to commit them")
    parser.add_argument("--methods", metavar="NAME,…", help="only these")
    parser.add_argument("--kept", type=Path, metavar="DIR", help="figures kept there count as finished runs")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value",
        help="such as seeds=[0,1,2,3,4], or a setting of every run: policy.path=DIR",
    )


def run(args: argparse.Namespace) -> int:
    if args.comparison.is_dir():
        print(_write_report(args.comparison))
        return 0
    comparison = load_comparison(args.comparison, args.overrides)
    if args.methods:
        comparison = comparison.only(args.methods.split(","))
    plan = Plan(comparison, Path(comparison.output_dir) / comparison.name)
    cells = plan.cells()
    if args.kept is not None and not args.dry_run:
        print(f"{args.kept}: {plan.take(args.kept)} of {len(cells)} runs were kept there with these settings")
    if args.dry_run:
        for cell in cells:
            print(f"{plan.status(cell):<6} {cell.name:<28} {shlex.join(plan.command(cell, TRAINER))}")
        return 0
    failed: list[str] = []
    limit_s = 60 * args.minutes_per_run
    if args.ray_address and not args.report_only:
        failed = run_cells_on_cluster(plan, TRAINER, args.ray_address, cpus=args.cpus_per_run, limit_s=limit_s)
    elif not args.report_only:
        failed = run_cells(plan, TRAINER, parallel=args.parallel, limit_s=limit_s)
    some = ["--methods", args.methods] if args.methods else []
    command = ["trace-async", "compare", str(args.comparison), *some, *args.overrides]
    report = report_finished(plan, shlex.join(command))
    if report is not None:
        print(report)
        if args.keep is not None:
            keep(plan.folder, args.keep)
    for name in failed:
        print(f"failed: {name}, see {plan.folder / 'logs' / (name + '.log')}", file=sys.stderr)
    return 1 if failed or report is None else 0


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_cells(plan: Plan, trainer: Sequence[str], *, parallel: int, limit_s: float) -> list[str]:
    """Run what is not finished; returns the names of runs that failed. Their logs are in `<folder>/logs`."""
    cells = plan.cells()
    waiting = [cell for cell in cells if plan.status(cell) != "done"]
    print(f"{plan.folder}: {len(cells) - len(waiting)} of {len(cells)} runs are finished", flush=True)
    try:
        return asyncio.run(_run_all(plan, waiting, trainer, parallel, limit_s)) if waiting else []
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None  # ended from outside is as after Ctrl-C


async def _run_all(
    plan: Plan, waiting: Sequence[Cell], trainer: Sequence[str], parallel: int, limit_s: float
) -> list[str]:
    # Ended from outside, it stops its runs as after Ctrl-C instead of leaving them behind.
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    parent = _parent_run(plan)
    slots = asyncio.Semaphore(max(1, parallel))
    failed: list[str] = []

    async def one(cell: Cell) -> None:
        async with slots:
            if not await _run_cell(plan, cell, trainer, parent, limit_s):
                failed.append(cell.name)

    first = waiting[0]
    if not plan.comparison.run_config(first.method, first.seed).policy.path:
        # It goes alone, since it builds the start policy that the others find in the cache.
        await one(first)
        waiting = waiting[1:]
    async with asyncio.TaskGroup() as group:
        for cell in waiting:
            group.create_task(one(cell))
    return failed


def run_cells_on_cluster(plan: Plan, trainer: Sequence[str], address: str, *, cpus: float, limit_s: float) -> list[str]:
    """As `run_cells`, with Ray Tune placing the runs on a cluster whose nodes share the comparison's folder.

    Each run is still a `trace-async train` of its own, with its own Ray on the node where Tune puts it; it is started
    in this directory, with this Python, so both must be there on every node.
    """
    import ray
    from ray import tune

    from actors.ray_cluster import join_cluster

    plan = Plan(plan.comparison, plan.folder.absolute())
    cells = {cell.name: cell for cell in plan.cells() if plan.status(cell) != "done"}
    parent = _parent_run(plan) if cells else None
    here = Path.cwd()

    def trial(settings: Mapping[str, str]) -> None:
        fine = asyncio.run(_run_cell(plan, cells[settings["run"]], trainer, parent, limit_s, here))
        tune.report({"finished": float(fine)})

    if cells:
        join_cluster(address)
        try:
            tune.Tuner(
                tune.with_resources(trial, {"cpu": cpus}),
                param_space={"run": tune.grid_search(list(cells))},
                run_config=tune.RunConfig(name="tune", storage_path=str(plan.folder), verbose=0),
            ).fit()
        finally:
            ray.shutdown()
    return [name for name, cell in cells.items() if plan.status(cell) != "done"]


async def _run_cell(
    plan: Plan, cell: Cell, trainer: Sequence[str], parent: str | None, limit_s: float, cwd: Path | None = None
) -> bool:
    """One run from its start, or from where it stopped, to its end; whether it ended well."""
    log = plan.folder / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = plan.command(cell, trainer)
    before, started = plan.wall_s(cell), time.monotonic()
    env = {"OMP_NUM_THREADS": "1", **os.environ} | ({"TRACE_ASYNC_PARENT_RUN": parent} if parent else {})
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run's process inherits the lock with its output
        except BlockingIOError:
            print(f"{cell.name}: still running, started by an earlier command that was killed", flush=True)
            return False
        plan.note(cell, wall_s=before, done=False)
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code: int | str = await asyncio.wait_for(process.wait(), limit_s)
        except TimeoutError:
            code = f"stopped after {limit_s / 60:.0f} minutes"
        finally:
            await _stop(process)
            wall_s = before + time.monotonic() - started
            plan.note(cell, wall_s=wall_s, done=process.returncode == 0)
    print(f"{cell.name}: {_outcome(plan, cell) if code == 0 else f'FAILED ({code})'}, {wall_s:.0f} s", flush=True)
    return code == 0


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a run that is still there as Ctrl-C would, so that it can be resumed; kill it when it does not end."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_LIMIT_S)


def _outcome(plan: Plan, cell: Cell) -> str:
    metric = plan.comparison.success[0]
    curve = _figures_of(plan, cell).curve(metric)
    if curve is None:
        return "done"
    return f"{metric} {curve.value[0]:.3f} → {curve.value[-1]:.3f} after {curve.cost[-1]:,.0f} tokens"


# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def report_finished(plan: Plan, command: str) -> Path | None:
    """Gather the figures of all finished runs and write the report; None when none is finished."""
    done = [cell for cell in plan.cells() if plan.status(cell) == "done"]
    if not done:
        print("no run is finished yet, so there is nothing to report", file=sys.stderr)
        return None
    wall = {cell.name: plan.wall_s(cell) for cell in done}
    runs = tuple(_figures_of(plan, cell) for cell in done)
    machines = "; ".join(dict.fromkeys(map(plan.machine, done)))
    write_figures(plan.folder, Figures(plan.comparison, runs, machines, wall, command))
    page = _write_report(plan.folder)
    _log_parent(plan, len(done))
    return page


def _figures_of(plan: Plan, cell: Cell) -> RunFigures:
    return run_figures(cell.method, cell.seed, read_metrics(plan.run_dir(cell)))


def _write_report(folder: Path) -> Path:
    """Write the report from the kept figures alone, so that it can be made again wherever they are."""
    return write_document(folder, *_report(folder))


def _report(folder: Path) -> tuple[str, list[Block]]:
    title, blocks = build_report(read_figures(folder), str(read_settings(folder)["base_config"]))
    return title, list(blocks)


def keep(folder: Path, target: Path) -> None:
    """Copy the figures and the report in words. ConfigError when figures of other runs are there.

    Charts and the page stay out of what is kept: `trace-async compare TARGET` draws them from the figures.
    """
    if (target / SETTINGS_FILE).is_file():
        there, here = ({Cell(run.method, run.seed) for run in read_figures(d).runs} for d in (target, folder))
        if lost := sorted(cell.name for cell in there - here):
            raise ConfigError(
                f"--keep {target}: {', '.join(lost)} kept there would be lost; name another folder, or take them in "
                f"with --kept {target}"
            )
    target.mkdir(parents=True, exist_ok=True)
    for name in (FIGURES_FILE, SETTINGS_FILE):
        shutil.copy2(folder / name, target)
    title, blocks = _report(folder)
    words: list[Block] = [block for block in blocks if not isinstance(block, Chart)]
    note = Paragraph(f"Charts are drawn from the figures beside this file: `trace-async compare {target}`.")
    write_whole(target / "report.md", to_markdown(title, [*words, note]))


# ── MLflow: the parent of the runs ───────────────────────────────────────────────────────────────────────────────


def _parent_tracker(plan: Plan) -> RunLog:
    config = plan.comparison.base_config()
    tracking = replace(config.tracking, uri=tracking_uri(config), system_metrics=False)
    config = replace(config, name=plan.comparison.name, tracking=tracking)
    return RunLog.start(config, plan.folder, resume_run_id=saved_run_id(plan.folder), resume_step=0, parent_run_id="")


def _parent_run(plan: Plan) -> str | None:
    """Return the MLflow run that the runs name as their parent; None when the tracking store does not answer."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    tracker = _parent_tracker(plan)
    run_id = tracker.wait_for_run_id()
    tracker.log_text(json.dumps(asdict(plan.comparison), indent=1), "comparison.json")
    tracker.finish()
    return run_id


def _log_parent(plan: Plan, num_done: int) -> None:
    """End figures of each method, by number of finished runs, and the report itself."""
    figures = read_figures(plan.folder)
    budget = compared_budget(figures)
    tracker = _parent_tracker(plan)
    metrics = {}
    for method in plan.comparison.methods:
        for metric in plan.comparison.success:
            ends = [float(curve.value[-1]) for curve in cut_curves(figures, method, metric, budget).values()]
            if ends:
                metrics[f"{metric}/{method}"] = sum(ends) / len(ends)
    tracker.log(metrics, num_done)
    for name in ("report.html", "report.md", FIGURES_FILE, SETTINGS_FILE):
        tracker.log_artifact(plan.folder / name)
    tracker.finish()
