"""`trace-async export`: a checkpoint's policy as a Hugging Face directory, at any time, without starting a run."""

import argparse
from pathlib import Path

from trace_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's directory; its newest checkpoint is taken")
    parser.add_argument("target", type=Path, help="the directory to write")
    parser.add_argument("--checkpoint", type=Path, help="this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from trace_async.learner.state import export_checkpoint
    from trace_async.run.checkpoint import check, latest_checkpoint

    checkpoint = check(args.checkpoint) if args.checkpoint else latest_checkpoint(args.run / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{args.run}: there is no checkpoint yet")
    export_checkpoint(checkpoint / "learner", args.target)
    print(args.target)
    return 0
