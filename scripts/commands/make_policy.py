"""`trace-async make-policy`: build (or find) the small start policy of an environment."""

import argparse
from pathlib import Path

from scripts.commands.train import ensure_policy
from trace_async.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file; its env and policy sections count")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")


def run(args: argparse.Namespace) -> int:
    print(ensure_policy(load_config(args.config, args.overrides)))
    return 0
