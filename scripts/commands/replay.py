"""`trace-async replay RUN --update N`: an update of a run made again, from the checkpoint before it, bit for bit."""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.commands.stopping import interrupted_by_signals, terminated_as_interrupted
from scripts.commands.train import expected_errors, in_words
from scripts.start_policy import ensure_policy
from trace_async.config import Config, ConfigError, load_config
from trace_async.printable import one_line, printable
from trace_async.run.schedule import Plan, UpdateRecord, plan_replay
from trace_async.tracking.log import read_metrics
from trace_async.trees.tree import RolloutTree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--update", type=int, required=True, metavar="N", help="the update to make again; the first is 1"
    )


def run(args: argparse.Namespace) -> int:
    import ray

    from actors.ray_cluster import start_ray

    if not (args.run / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: there is no run (config.yaml is missing)")
    config = load_config(args.run / "config.yaml")
    plan = plan_replay(args.run, args.update)
    policy_path = ensure_policy(config)
    print(f"from {plan.checkpoint or 'the beginning of the run'}; starting Ray ...", flush=True)
    try:
        with terminated_as_interrupted():
            start_ray(config)
        return asyncio.run(interrupted_by_signals(_replay(config, args.run, policy_path, plan)))
    except expected_errors() as error:
        print(f"trace-async: {printable(in_words(error, args.run), 10_000)}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()


async def _replay(config: Config, run_dir: Path, policy_path: Path, plan: Plan) -> int:
    """Say of every update whether it came out as in the run, and of the last one what it was given and did."""
    from actors.replay import replay_run

    first_apart: int | None = None
    made = None
    async with contextlib.aclosing(replay_run(config, run_dir, policy_path, plan)) as updates:
        async for made in updates:
            said = f"update {made.record.update}: {len(made.trees)} trees at version {made.record.policy_version}, "
            if not made.record.ended:
                said += "which the run did not end; there is nothing to compare"
            elif made.otherwise:
                said += f"otherwise than in the run: {' and '.join(made.otherwise)}"
                first_apart = first_apart or made.record.update
            else:
                said += "as in the run"
            print(said, flush=True)
    assert made is not None, "a plan has at least one update"
    recorded = next((p.metrics for p in read_metrics(run_dir) if p.step == made.record.update), {})
    lines = [*tree_lines(made.trees), *arrival_lines(made.record)]
    print("\n".join([*lines, f"  {'figure':<36} {'now':>14} {'in the run':>14}"]))
    for name, value in sorted(made.figures.items()):
        if not name.endswith(("seconds", "busy_s")):
            was = f"{recorded[name]:14.6g}" if name in recorded else f"{'–':>14}"
            print(f"  {one_line(name):<36} {value:14.6g} {was}")
    print(f"Its trees: {run_dir / 'schedule' / f'{made.record.update:06d}.trees.jsonl'}")
    if first_apart is not None:
        print(
            f"trace-async: from update {first_apart} on it is not what the run made: another machine, another number "
            "of threads, other versions, or a part that was started anew in between",
            file=sys.stderr,
        )
    return 0 if first_apart is None else 1


def tree_lines(trees: Sequence[RolloutTree]) -> Iterator[str]:
    """A line for each tree of an update, in its order."""
    for number, tree in enumerate(trees, start=1):
        rewards = [rollout.reward for rollout in tree.rollouts]
        versions = sorted({span.policy_version for node in tree.nodes for span in node.version_spans})
        yield (
            f"  tree {number}: {one_line(tree.task.id, 60)}, {len(rewards)} rollouts, mean reward "
            f"{sum(rewards) / len(rewards):.2f}, {tree.num_generated_tokens} tokens by versions "
            f"{', '.join(map(str, versions))}"
        )


def arrival_lines(record: UpdateRecord) -> Iterator[str]:
    """What arrived since the update before, with the seconds since the first of it."""
    for arrival in record.arrivals:
        after = arrival.at - record.arrivals[0].at
        yield f"  +{after:.2f} s: prompt {arrival.ticket}, {one_line(arrival.task_id, 60)}: {one_line(arrival.fate)}"
