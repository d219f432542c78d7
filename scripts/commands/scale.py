"""`trace-async scale RUN N`: have N generators in a run that is under way."""

import argparse
from pathlib import Path

from trace_async.config import ConfigError
from trace_async.run.scaling import order
from trace_async.run.session import last_session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("num_generators", type=int, metavar="N", help="generators from now on")


def run(args: argparse.Namespace) -> int:
    if args.num_generators < 1:
        raise ConfigError(f"scale {args.num_generators}: keep at least one generator")
    if not (args.run / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: there is no run (config.yaml is missing)")
    session = last_session(args.run)
    if session is None or not session.is_alive():
        raise ConfigError(f"{args.run}: no process works on this run; actors.num_generators is what it starts with")
    order(args.run, args.num_generators)
    print(f"{args.run}: {args.num_generators} generators from now on; its own rule is off")
    print(f"See: trace-async status {args.run}")
    return 0
