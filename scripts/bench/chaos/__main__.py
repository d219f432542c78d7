"""Run the real thing on this machine while it is killed, hung, slowed, filled up and stopped at random, from a seed.

    python -m scripts.bench.chaos --minutes 10 --seed 1            # faults, one after another, for ten minutes
    python -m scripts.bench.chaos --faults 5 --seed 3              # five faults, however long they take
    python -m scripts.bench.chaos --soak --minutes 60              # no faults; what every process holds, over time
    python -m scripts.bench.chaos --config F [section.name=value]  # another run than the small one

Real Ray, a real DeepSpeed learner, the embedded engine, a small policy; environments raise, hang and answer NaN all
the while. Everything lies in --out: chaos.json, samples.csv, what the drivers printed, and the run itself.
The exit status is 1 when a promise of docs/RELIABILITY.md did not hold; each is named in a line BROKEN.
"""

import argparse
import itertools
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.bench.chaos.disk import Disk
from scripts.bench.chaos.inject import Chaos
from scripts.bench.chaos.processes import Sample, as_csv, marked, sample
from scripts.bench.chaos.report import Report, soak_charts
from scripts.bench.chaos.run import LimitError, Run
from scripts.bench.chaos.schedule import Fault, schedule
from scripts.start_policy import ensure_policy
from trace_async.config import Config, load_config

SMALL = [
    "env.name=envs.example:GuessNumber",
    "policy.hidden_size=64",
    "policy.num_layers=2",
    "policy.warm_start_steps=60",
    "sampling.max_turn_tokens=8",
    "sampling.max_context_tokens=128",
    "budget={root_rollouts: 16, pool_size: 8, warmup_rounds: 0, continuations_per_root: 1}",
    "predictor.steps_per_update=1",
    "learner.learning_rate=1e-5",
    "learner.step_timeout_s=120",
    "actors.num_generators=2",
    "actors.generator_cpus=0",
    "eval.num_tasks=5",
    "eval.every_updates=8",
    "checkpoint.every_updates=3",
]
MANY_UPDATES = 1_000_000
"""More than a chaos makes: it ends the run, not the number of updates."""
LAST_UPDATES = 2
"""Updates of the last driver, which ends by itself."""
SAMPLE_EVERY_S = 5.0


class Sampler:
    """Looks at all processes of a run every few seconds, in a thread."""

    def __init__(self, mark: str) -> None:
        self.samples: list[Sample] = []
        self._mark, self._started, self._ended = mark, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            seconds = time.monotonic() - self._started
            self.samples += [one for process in marked(self._mark) if (one := sample(process, seconds))]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def run_settings(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """Return the config, and the settings of `trace-async train` that make it; its environment is made to misbehave."""
    chosen = [*([] if args.config else SMALL), *args.overrides]
    config = load_config(args.config, chosen)
    inner = json.dumps({"name": config.env.name, "args": config.env.args})
    settings = [
        *(["--config", str(args.config)] if args.config else []),
        *chosen,
        "env.name=scripts.bench.chaos.environment:Misbehaving",
        f"env.args={{env: {inner}, share: {args.share}, seed: {args.seed}}}",
        *(f"env.{method}_timeout_s=2" for method in ("init", "step", "fork", "close")),
        f"policy.path={ensure_policy(config)}",
        f"num_updates={MANY_UPDATES}",
    ]
    return config, settings


def play(args: argparse.Namespace, run: Run, chaos: Chaos, faults: Iterable[Fault], began: float) -> None:
    """The faults, or a soak, for as long as is asked for."""
    run.start()
    run.wait("the first update", run.num_updates)
    if args.soak:
        soak_s = 60 * args.minutes
        run.wait(
            "the end of the soak", lambda: time.monotonic() - began > soak_s, every_s=1.0, limit_s=soak_s + run.limit_s
        )
        return
    for fault in faults:
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            break
        print(
            f"{time.monotonic() - began:6.0f} s  {fault.number}. {fault.name}, {fault.phase or 'at once'}", flush=True
        )
        chaos.play(fault)
    chaos.recover()


def end(run: Run) -> None:
    """SIGTERM, then a last driver that makes its updates, evaluates, exports and ends by itself."""
    if run.driver.poll() is None:
        run.driver.send_signal(signal.SIGTERM)
        run.wait("the end after SIGTERM", lambda: False)
        if run.driver.returncode != 130:
            run.broken.append(f"driver {run.num_drivers} was told to stop and ended with {run.driver.returncode}")
    run.check_end()
    run.start(f"num_updates={run.num_updates() + LAST_UPDATES}")
    run.wait("the end of the run", lambda: False)
    run.check_end()
    if run.driver.returncode:
        run.broken.append(f"the last driver ended with {run.driver.returncode}: see {run.terminal}")
    elif not (run.run_dir / "policy" / "model.safetensors").is_file():
        run.broken.append("the run ended and left no policy")


def torment(args: argparse.Namespace, faults: Iterable[Fault]) -> Report:
    """Start a run, do all this to it, and end it; what came of it."""
    began = time.monotonic()
    out = args.out.absolute()
    config, settings = run_settings(args)
    mark = f"{time.time_ns()}"
    # A soak fills no disk, and an hour of figures and checkpoints takes more than the small one has.
    disk = Disk(out / "disk", megabytes=4096 if args.soak else 192)
    run = Run(disk.folder, out / "terminals", settings, mark, args.limit)
    actors = config.actors
    expected = {"generator": actors.num_generators, "prompts": actors.num_prompt_actors}
    chaos = Chaos(run, disk, expected | {"learner": config.learner.num_ranks, "predictor": 1})
    sampler = Sampler(mark)
    try:
        play(args, run, chaos, faults, began)
        end(run)
    except LimitError as error:
        run.broken.append(str(error))
    finally:
        sampler.close()
        run.give_up()
        (out / "samples.csv").write_text(as_csv(sampler.samples), encoding="utf-8")
        report = report_of(args, run, chaos, began)
        (out / "chaos.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        disk.close(out)
    if args.soak:
        for name, chart in soak_charts(sampler.samples).items():
            (out / f"{name}.svg").write_text(chart, encoding="utf-8")
    return report


def report_of(args: argparse.Namespace, run: Run, chaos: Chaos, began: float) -> Report:
    """Look at what is left of the run, which has ended."""
    saved = run.check_books("the end")
    status = run.mlflow_status()
    if status not in ("FINISHED", "KILLED"):
        run.broken.append(f"MLflow has the run as {status}")
    environment: Counter[str] = Counter()
    for point in run.updates():
        environment.update({n.removeprefix("faults/"): v for n, v in point.metrics.items() if n.startswith("faults/")})
    return Report(
        seed=args.seed,
        minutes=round((time.monotonic() - began) / 60, 2),
        outcomes=chaos.outcomes,
        drivers=run.num_drivers,
        updates=run.num_updates(),
        ledger=saved.state.ledger.state() if saved else {},
        environment=dict(environment),
        orphans=run.num_orphans,
        mlflow=str(status),
        broken=run.broken,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="how long faults are played; 0: until --faults")
    parser.add_argument("--faults", type=int, default=None, help="so many faults; none: as many as --minutes allow")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soak", action="store_true", help="no faults: what every process holds, over --minutes")
    parser.add_argument("--share", type=float, default=0.01, help="of the environment's calls that go wrong")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds in which anything must be overcome")
    parser.add_argument("--out", type=Path, default=None, help="a new folder (runs/chaos-SEED)")
    parser.add_argument("--config", type=Path, default=None, help="a YAML file of settings in place of the small run's")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    args = parser.parse_intermixed_args(arguments)
    if not args.minutes and not args.faults:
        parser.error("give --minutes or --faults")
    args.out = args.out or Path("runs") / f"chaos-{args.seed}"
    if args.out.exists():
        parser.error(f"--out {args.out} is there already: give another one")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing of the run is left behind
    args = parse(arguments)
    report = torment(args, itertools.islice(schedule(args.seed), args.faults))
    print(report.table())
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
