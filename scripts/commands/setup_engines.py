"""`trace-async setup-engines [sglang|vllm]`: build the engines' environments, also where there is no checkout."""

import argparse
import subprocess
from importlib.resources import files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="sglang or vllm (default: both)")


def run(args: argparse.Namespace) -> int:
    script = files("scripts").joinpath("setup_engines.sh")
    return subprocess.run(["bash", str(script), *args.engines], check=False).returncode
