"""`trace-async get-policy`: bring a pretrained policy here, and say what its folder says."""

import argparse
import sys

from trace_async.config import Config, ConfigError, PolicyConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="smollm2, a GGUF file, or a Hugging Face directory")
    parser.add_argument("--cache-dir", default=PolicyConfig().cache_dir, help="where a conversion is kept")


def run(args: argparse.Namespace) -> int:
    from trace_async.policy.get_policy import get_policy
    from trace_async.policy.report import describe_policy

    try:
        # stdout is the folder alone, so that a script can take it: policy.path=$(trace-async get-policy smollm2)
        directory = get_policy(args.source, args.cache_dir, log=lambda line: print(line, file=sys.stderr))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print("\n".join(describe_policy(directory, Config())), file=sys.stderr)
    print(directory)
    return 0
