"""`trace-async eval`: held-out success of a policy, or of what a run has trained."""

import argparse
import asyncio
import sys
from pathlib import Path

from scripts.commands.stopping import interrupted_by_signals, terminated_as_interrupted
from scripts.commands.train import expected_errors, in_words
from scripts.start_policy import ensure_policy
from trace_async.config import ConfigError, load_config
from trace_async.printable import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("--run", type=Path, help="evaluate this run's trained policy, with the run's config")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="such as eval.num_tasks=1000")


def run(args: argparse.Namespace) -> int:
    import ray

    from actors.evaluation import evaluate_policy
    from actors.ray_cluster import start_ray

    if args.run is not None:
        config = load_config(args.run / "config.yaml", args.overrides)
        policy_path = (args.run / "policy").absolute()
        if not policy_path.is_dir():
            raise ConfigError(f"--run {args.run}: it has no trained policy yet ({policy_path} is missing)")
    else:
        config = load_config(args.config, args.overrides)
        policy_path = ensure_policy(config)
    log_dir = Path(config.output_dir).absolute() / "eval_logs"
    try:
        with terminated_as_interrupted():
            placed = start_ray(config, only_generators=True)
        metrics = asyncio.run(interrupted_by_signals(evaluate_policy(placed, policy_path, log_dir)))
    except expected_errors() as error:
        print(f"trace-async: {in_words(error, log_dir)}\nThe logs are in {log_dir}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    print(f"policy {policy_path}")
    for name, value in sorted(metrics.items()):
        print(f"{one_line(name):<44} {value:.4f}")
    if not any(name.startswith("heldout/success_") for name in metrics):
        print(f"trace-async: more than one task in ten broke down: no average; see {log_dir}", file=sys.stderr)
        return 1
    return 0
