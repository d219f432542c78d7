"""`trace-async train`: one run from its config to its summary."""

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.commands.stopping import run_until_stopped, terminated_as_interrupted
from scripts.commands.witness import witnessed
from scripts.start_policy import ensure_policy
from trace_async.config import Config, ConfigError, config_to_yaml, load_config
from trace_async.printable import printable
from trace_async.run.checkpoint import CheckpointError
from trace_async.run.session import (
    SESSION_FILE,
    RunFolderError,
    abandoned,
    at_work,
    claim_new,
    free_name,
    how_it_ended,
    require_free,
    resume_command,
)
from trace_async.tracking.log import write_whole

if TYPE_CHECKING:
    from scripts.commands.recording import Recorder
    from trace_async.tracking.progress import Progress

log = logging.getLogger("trace_async")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the user has to mend where the files lie."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run's directory")
    parser.add_argument("--dry-run", action="store_true", help="print config and plan, check everything, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    config, wanted = _config_and_run_dir(args)
    resume = args.resume is not None
    plan = check_run(config)
    if args.dry_run:
        print(config_to_yaml(config))
        print("\n".join([plan, f"run directory    {wanted if resume else free_name(wanted)}"]))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _report_abandoned(Path(config.output_dir))
    try:
        run_dir = _claim(config, wanted, resume=resume)
        with at_work(run_dir), witnessed(run_dir):
            _log_to_file(run_dir / "logs" / "trainer.log")
            return _train(config, run_dir, resume=resume)
    except (RunFolderError, CheckpointError, OSError) as error:
        print(f"trace-async: {printable(in_words(error, wanted), 10_000)}", file=sys.stderr)
        return 2


def _claim(config: Config, wanted: Path, *, resume: bool) -> Path:
    """Claim the run's folder, which no other process then takes, and write the config into it as it is now."""
    if not resume:
        return claim_new(wanted, config_to_yaml(config))
    require_free(wanted)
    if (ended := how_it_ended(wanted)) is not None:
        print(f"trace-async: {ended}", file=sys.stderr)
    write_whole(wanted / "config.yaml", config_to_yaml(config))  # without it the run could not be gone on with
    return wanted


def _report_abandoned(output_dir: Path) -> None:
    """Say which runs beside this one ended without a word, once, and end them in MLflow, where they still run."""
    for run_dir in abandoned(output_dir):
        print(f"trace-async: {how_it_ended(run_dir)}. Go on with it: {resume_command(run_dir)}", file=sys.stderr)
        from trace_async.tracking.mlflow_tracker import end_abandoned

        end_abandoned(load_config(run_dir / "config.yaml"), run_dir)
        (run_dir / SESSION_FILE).unlink(missing_ok=True)


def _train(config: Config, run_dir: Path, *, resume: bool) -> int:
    import ray

    from actors.trainer import StopRequestedError
    from scripts.commands.recording import Recorder, progress_of
    from trace_async.run.checkpoint import latest_checkpoint
    from trace_async.run.state import load_trainer
    from trace_async.tracking.tracker import RunStatus

    checkpoint = latest_checkpoint(run_dir / "checkpoints") if resume else None
    first = load_trainer(checkpoint).state if checkpoint else None
    with contextlib.ExitStack() as making:
        progress = making.enter_context(progress_of(config, run_dir, first))
        policy_path = _start_policy(config, progress)
        progress.message(f"Run {run_dir}; policy {policy_path}; starting Ray ...")
        recorder = Recorder(config, run_dir, policy_path, resume=resume, first=first, progress=progress)
        shown = making.pop_all()
    status: RunStatus = "FAILED"
    try:
        with shown:  # what is said about the end comes below it
            _work(config, run_dir, policy_path, recorder, checkpoint)
        status = "FINISHED"
    except (KeyboardInterrupt, StopRequestedError) as stop:
        status = "KILLED"
        saved = stop.checkpoint if isinstance(stop, StopRequestedError) else None
        kept = f"what it has is saved as {saved}" if saved else "nothing new was saved"
        print(f"\nStopped; {kept}. Go on with: {resume_command(run_dir)}", file=sys.stderr)
        return 130
    except expected_errors() as error:
        log.exception("the run ended")
        print(
            f"\ntrace-async: {printable(in_words(error, run_dir), 10_000)}\n"
            f"The whole story is in {run_dir / 'logs' / 'trainer.log'}. Go on from the last checkpoint: "
            f"{resume_command(run_dir)}",
            file=sys.stderr,
        )
        return 1
    finally:
        recorder.finish(status)
        ray.shutdown()
    _print_end(config, run_dir)
    return 0


def _start_policy(config: Config, progress: "Progress") -> Path:
    from trace_async.policy.report import describe_policy

    if not config.policy.path:
        progress.phase(["policy"])
    policy_path = ensure_policy(config, log=progress.step)
    for line in describe_policy(policy_path, config):
        progress.message(line)
    return policy_path


def _work(config: Config, run_dir: Path, policy_path: Path, recorder: "Recorder", checkpoint: Path | None) -> None:
    """Start Ray and run the trainer to its end."""
    from actors.ray_cluster import start_ray
    from actors.trainer import Trainer

    recorder.progress.phase(["start"])
    with terminated_as_interrupted():
        placed = start_ray(config)
    trainer = Trainer(
        placed,
        run_dir,
        policy_path,
        recorder.on_metrics,
        on_rollback=recorder.on_rollback,
        on_resize=recorder.on_resize,
        on_phase=recorder.progress.phase,
    )
    recorder.on_tasks(trainer.train_tasks, trainer.heldout_tasks)
    asyncio.run(run_until_stopped(trainer.run(checkpoint), trainer.stop))


def expected_errors() -> tuple[type[BaseException], ...]:
    """Return what may end a run through no fault in this program; anything else is shown with its traceback."""
    from ray.exceptions import RayError

    from actors.calls import CallError
    from trace_async.engine import EngineError
    from trace_async.run.rounds import NothingToLearnError

    return (RayError, EngineError, CallError, NothingToLearnError, CheckpointError, RunFolderError, OSError)


def in_words(error: BaseException, folder: Path) -> str:
    """Return what a method of an actor raised, without the traceback that Ray wraps it in; what to do about a disk.

    `folder`: where the run writes; the error of a file that is open already does not name it.
    """
    from ray.exceptions import RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
        name = cause.filename or f"a file under {folder}"
        return f"{name}: {cause.strerror}; free some space there, or make it writable"
    return str(cause)


def _print_end(config: Config, run_dir: Path) -> None:
    from trace_async.tracking.log import read_metrics
    from trace_async.tracking.mlflow_tracker import ui_command
    from trace_async.tracking.summary import summarise

    print(summarise(read_metrics(run_dir)))
    print(f"\nPolicy (Hugging Face):  {run_dir / 'policy'}")
    print(f"Its rollout trees:      trace-async view {run_dir}")
    print(f"All figures:            {ui_command(config)}")


def _config_and_run_dir(args: argparse.Namespace) -> tuple[Config, Path]:
    if args.resume is not None:
        if args.config is not None:
            raise ConfigError("--resume takes the run's own config; give only overrides beside it")
        saved = args.resume / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"--resume {args.resume}: there is no run ({saved} is missing)")
        return load_config(saved, args.overrides), args.resume
    config = load_config(args.config, args.overrides)
    return config, Path(config.output_dir) / config.name


def check_run(config: Config) -> str:
    """Return the plan of a run in words; model, data and environment are checked. ConfigError when one will not do."""
    from envs import load_domain
    from envs.tasks import heldout_tasks, load_splits
    from trace_async.run.plan import plan_run

    lines = [str(plan_run(config))]
    domain = load_domain(config.env)
    splits = load_splits(domain)
    lines += [f"train            {len(splits.train)} tasks of {domain.name}", *splits.notes]
    lines.append(f"heldout          {len(splits.heldout)} tasks of {domain.name}")
    for set_name, tasks in list(heldout_tasks(config).items())[1:]:
        lines.append(f"                 {len(tasks)} tasks of {config.env_of(set_name).name} as eval.sets.{set_name}")
    if len(splits.train) < config.budget.pool_size:
        lines.append(
            f"                 fewer than budget.pool_size={config.budget.pool_size}: a pool holds each of them once"
        )
    if config.policy.path:
        lines += [f"policy           {config.policy.path}", *_described(config)]
    else:
        lines.append(f"policy           a small one will be built for {domain.name} under {config.policy.cache_dir}")
    return "\n".join(lines)


def _described(config: Config) -> list[str]:
    """Return what the policy's folder says, checked; of a folder on another machine only that it is not here."""
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
    # What breaks down in environments is shown in the terminal too, once each.
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("trace-async: %(message)s"))
    logging.getLogger("trace_async.faults").addHandler(shown)
    logging.raiseExceptions = False  # a disk without room for the log ends no run and fills no terminal
    logging.captureWarnings(True)
    warnings.simplefilter("default")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
