"""Stands in for `trace-async train` in tests of the comparison: same arguments, same files, invented figures.

With FAKE_TRAINER_DIES=<run name> the run ends half-way with status 1, the first time; FAKE_TRAINER_HANGS=<run name>: it
waits for ever; FAKE_TRAINER_WAITS="<run name> <other>": it waits until the other has begun.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from trace_async.config import Config, config_to_yaml, load_config
from trace_async.tracking.log import Point, point_line

GAIN = {"uniform": 0.2, "beta": 0.4, "point": 0.3}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.resume:
        run_dir, config = args.resume, load_config(args.resume / "config.yaml")
    else:
        config = load_config(args.config, args.overrides)
        run_dir = Path(config.output_dir) / config.name
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(config_to_yaml(config))
    print(
        f"training {config.name}; process {os.getpid()}; parent {os.environ.get('TRACE_ASYNC_PARENT_RUN', '')}",
        flush=True,
    )
    if os.environ.get("FAKE_TRAINER_HANGS") == config.name:
        time.sleep(600)
    waits, _, other = os.environ.get("FAKE_TRAINER_WAITS", "").partition(" ")
    while waits == config.name and not (run_dir.parent / other).is_dir():
        time.sleep(0.05)
    return train(config, run_dir, resumed=args.resume is not None)


def train(config: Config, run_dir: Path, *, resumed: bool) -> int:
    total = config.max_generated_tokens
    with (run_dir / "metrics.jsonl").open("a") as file:
        for update in range(6 if resumed else 0, 12):
            if update == 6 and not resumed and os.environ.get("FAKE_TRAINER_DIES") == config.name:
                return 1
            file.write(point_line(Point(update, time.time(), figures(config, update, total))))
            file.flush()
    return 0


def figures(config: Config, update: int, total: int) -> dict[str, float]:
    tokens = update * total / 10.5  # the last update is past the budget, as in real runs
    share = tokens / total
    level = 0.25 + 0.01 * config.seed + GAIN[config.budget.stage1] * share
    metrics = {"tokens/generated_total": tokens, "time/elapsed_s": 2.0 * update, "time/step_s": 2.0}
    if update:
        metrics |= {
            "train/effective_ratio": 0.3 + share / 4,
            "train/prompts_both_outcomes": 8.0,
            "budget/roots": 64.0,
            "budget/trajectory_equivalents": 128.0,
            "predictor/busy_s": 0.1,
            "predictor/brier": 0.2,
        }
    if update % 2 == 0 or update == 11:
        metrics |= {"heldout/success_t1.0": level, "heldout/success_t0.0": level + 0.2}
    return metrics


if __name__ == "__main__":
    sys.exit(main())
