"""`trace-async status RUN`: whether a run is under way, how far it is, and how many generators it has, and why."""

import argparse
import time
from pathlib import Path

from trace_async.config import ConfigError, load_config
from trace_async.run.scaling import kept_sizes, ordered
from trace_async.run.session import how_it_ended, last_session, phases_of
from trace_async.tracking.log import read_metrics

SHOWN_SIZES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")


def run(args: argparse.Namespace) -> int:
    if not (args.run / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: there is no run (config.yaml is missing)")
    print("\n".join(status_lines(args.run)))
    return 0


def status_lines(run_dir: Path) -> list[str]:
    """Return what there is to say of a run, a line each."""
    config = load_config(run_dir / "config.yaml")
    session = last_session(run_dir)
    state = "no process works on it"
    if session is not None and session.is_alive():
        state = f"process {session.pid} on {session.host} works on it"
        now = time.time()
        doing = [f"{name} for {max(0.0, now - since):.0f} s" for name, since in phases_of(run_dir).items()]
        state += f": {', '.join(doing)}" if doing else ""
    elif (ended := how_it_ended(run_dir)) is not None:
        state = ended
    lines = [f"{run_dir}: {state}"]
    points = [point for point in read_metrics(run_dir) if "time/step_s" in point.metrics]
    if points:
        last = points[-1]
        figures = last.metrics
        lines.append(
            f"update {last.step}/{config.num_updates}, {figures['time/step_s']:.1f} s each; learner waiting "
            f"{figures['idle/learner_share']:.0%}, generators idle {figures['idle/generator_share']:.0%}"
        )
        lines.append(
            f"generators ready: {figures['generators/ready']:.0f}, lost so far: {figures['generators/lost']:.0f}"
        )
    wanted = ordered(run_dir)
    if wanted is not None:
        lines.append(f"generators asked for: {wanted} (the rule is off)")
    for size in kept_sizes(run_dir)[-SHOWN_SIZES:]:
        lines.append(f"after update {size.update}: {size.num_generators} generators, {size.reason}")
    return lines
