"""`trace-async train`: one run from its config to its summary."""

import argparse
import asyncio
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.start_policy import ensure_policy
from trace_async.config import Config, ConfigError, config_to_yaml, load_config
from trace_async.printable import printable
from trace_async.trees.tree import RolloutTree

if TYPE_CHECKING:
    from trace_async.tracking.mlflow import Tracker

log = logging.getLogger("trace_async")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run's directory")
    parser.add_argument("--dry-run", action="store_true", help="print config and plan, check everything, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    config, run_dir = _config_and_run_dir(args)
    if args.dry_run:
        return _dry_run(config, run_dir)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from trace_async.policy.report import describe_policy

    policy_path = ensure_policy(config)
    print("\n".join(describe_policy(policy_path, config)))
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    _log_to_file(run_dir / "logs" / "trainer.log")
    return _train(config, run_dir, policy_path, resume=args.resume is not None)


def _train(config: Config, run_dir: Path, policy_path: Path, *, resume: bool) -> int:
    import ray
    from ray.exceptions import RayError, RayTaskError

    from actors.learner import LearnerRankError
    from actors.ray_cluster import start_ray
    from actors.trainer import Trainer
    from trace_async.engine import EngineError
    from trace_async.run.checkpoint import latest_checkpoint
    from trace_async.run.state import load_trainer
    from trace_async.tracking.log import read_metrics
    from trace_async.tracking.mlflow import RunStatus, Tracker, saved_run_id, ui_command
    from trace_async.tracking.progress import Progress
    from trace_async.tracking.summary import summarise
    from trace_async.trees.io import trees_path, write_trees

    checkpoint = latest_checkpoint(run_dir / "checkpoints") if resume else None
    first = load_trainer(checkpoint).state if checkpoint else None
    print(f"Run {run_dir}; policy {policy_path}; starting Ray ...", flush=True)
    start_ray(config)
    tracker = Tracker.start(
        config,
        run_dir,
        resume_run_id=saved_run_id(run_dir) if resume else None,
        # A run that was killed before its first checkpoint starts anew, so none of its points stay.
        resume_step=(first.num_updates if first else -1) if resume else None,
    )
    progress = Progress(
        config.num_updates,
        token_budget=config.max_generated_tokens,
        first_update=first.num_updates if first else 0,
        tokens_before=first.generated_tokens if first else 0,
    )

    def on_metrics(step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        tracker.log(metrics, step)
        progress.update(step, metrics)
        if trees and config.tracking.trees_per_artifact:
            path = trees_path(run_dir, step)
            write_trees(path, trees[: config.tracking.trees_per_artifact])
            tracker.log_artifact(path, "trees")

    status: RunStatus = "FAILED"
    try:
        with progress:
            trainer = Trainer(config, run_dir, policy_path, on_metrics)
            asyncio.run(trainer.run(checkpoint))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print(f"\nStopped. Go on with: trace-async train --resume {run_dir}", file=sys.stderr)
        raise
    except (RayError, EngineError, LearnerRankError, TimeoutError) as error:
        log.exception("the run ended")
        cause = error.cause if isinstance(error, RayTaskError) else error
        print(
            f"\ntrace-async: {printable(str(cause), 10_000)}\n"
            f"The whole story is in {run_dir / 'logs' / 'trainer.log'}. Go on from the last checkpoint: "
            f"trace-async train --resume {run_dir}",
            file=sys.stderr,
        )
        return 1
    finally:
        _log_page(run_dir, tracker)
        tracker.finish(status)
        ray.shutdown()
    print(summarise(read_metrics(run_dir)))
    print(f"\nPolicy (Hugging Face):  {run_dir / 'policy'}")
    print(f"Its rollout trees:      trace-async view {run_dir}")
    print(f"All figures:            {ui_command(config)}")
    return 0


def _log_page(run_dir: Path, tracker: "Tracker") -> None:
    """Keep the viewer's page of the run's trees and curves, in its directory and as an artifact."""
    from scripts.viewer.source import RunSource
    from trace_async.tracking.log import write_whole
    from trace_async.trees.io import tree_files

    if not tree_files(run_dir):
        return
    page = run_dir / "trees.html"
    write_whole(page, RunSource(run_dir).page())
    tracker.log_artifact(page)


def _config_and_run_dir(args: argparse.Namespace) -> tuple[Config, Path]:
    if args.resume is not None:
        if args.config is not None:
            raise ConfigError("--resume takes the run's own config; give only overrides beside it")
        saved = args.resume / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"--resume {args.resume}: there is no run ({saved} is missing)")
        return load_config(saved, args.overrides), args.resume
    config = load_config(args.config, args.overrides)
    return config, _free_run_dir(Path(config.output_dir) / config.name)


def _free_run_dir(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that holds no run yet."""
    candidate, number = wanted, 1
    while (candidate / "config.yaml").exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate


def _dry_run(config: Config, run_dir: Path) -> int:
    """Resolved config and plan, with model, data and environment checked."""
    from envs import load_domain
    from trace_async.run.plan import plan_run

    print(config_to_yaml(config))
    print(plan_run(config))
    domain = load_domain(config.env)
    print(f"run directory    {run_dir}")
    for split in ("train", "heldout"):
        tasks = domain.tasks(split)
        print(f"{split:<16} {len(tasks)} tasks of {domain.name}")
        if not tasks:
            raise ConfigError(f"env.name={config.env.name}: there are no {split} tasks")
    if config.policy.path:
        print(f"policy           {config.policy.path}")
        print("\n".join(_described(config)))
    else:
        print(f"policy           a small one will be built for {domain.name} under {config.policy.cache_dir}")
    return 0


def _described(config: Config) -> list[str]:
    """What the policy's folder says, checked; of a folder on another machine only that it is not here."""
    from trace_async.policy.report import describe_policy

    if not (Path(config.policy.path) / "config.json").is_file():
        return ["                 not on this machine: its sizes are those that its name stands for"]
    return describe_policy(config.policy.path, config)


def _log_to_file(path: Path) -> None:
    """The trainer's own log; libraries' warnings go there too instead of the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
