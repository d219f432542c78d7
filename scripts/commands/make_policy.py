"""`trace-async make-policy`: the small start policy of an environment, or a cold start of a given one.

trace-async make-policy env.name=multihop
trace-async make-policy policy.path=DIR env.name=multihop cold_start.lora_rank=16
trace-async make-policy policy.path=DIR cold_start.chats=mine.jsonl
"""

import argparse
import sys
from pathlib import Path

from scripts.start_policy import ensure_policy
from trace_async.config import Config, ConfigError, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file; its env, policy, cold_start and sampling count")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    # stdout is the folder alone, so that a script can take it.
    print(_taught(config) if config.policy.path else ensure_policy(config))
    return 0


def _taught(config: Config) -> Path:
    from envs import load_domain
    from trace_async.learner.cold_start import cold_start

    domain = None if config.cold_start.chats else load_domain(config.env)
    try:
        return cold_start(domain, config, log=lambda line: print(line, file=sys.stderr, flush=True)).absolute()
    except ValueError as error:
        raise ConfigError(str(error)) from error
