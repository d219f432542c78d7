"""`trace-async env check NAME`: does an environment keep its contract? Says in words what is wrong."""

import argparse
import time

from envs import BUILT_IN, load_domain
from envs.contract.check import check_domain
from trace_async.config import load_config
from trace_async.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check"])
    parser.add_argument("name", help=f"{', '.join(BUILT_IN)}, or package.module:Class of your own")
    parser.add_argument("overrides", nargs="*", metavar="env.args.name=value", help="arguments of the environment")
    parser.add_argument("--tasks", type=int, default=10, help="how many tasks of each split are played (default 10)")


def run(args: argparse.Namespace) -> int:
    """0: the contract is kept; 1: it is broken."""
    config = load_config(None, [*args.overrides, f"env.name={args.name}"])
    started = time.monotonic()
    findings = check_domain(load_domain(config.env), num_tasks=args.tasks, settings=config.env)
    for finding in findings:
        print(f"{finding.level:<7} {printable(finding.text, 2_000)}")
    num_errors = sum(finding.level == "error" for finding in findings)
    verdict = (
        "keeps the contract" if not num_errors else f"breaks the contract: {num_errors} error{'s' * (num_errors > 1)}"
    )
    print(f"{args.name} {verdict} ({time.monotonic() - started:.0f} s)")
    return int(num_errors > 0)
