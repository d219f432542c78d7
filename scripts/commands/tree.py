"""`trace-async tree RUN`: a rollout tree of a run with outcomes, values and credits by node, as text; or the page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scripts.viewer.source import RunSource, read, update_of
from trace_async.config import ConfigError
from trace_async.tracking.log import write_whole
from trace_async.trees.io import tree_files
from trace_async.trees.text import summary, tree_text
from trace_async.trees.tree import RolloutTree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--update", type=int, help="trees of this update (default: the last with any)")
    parser.add_argument("--index", type=int, help="which tree of it, from 0 (default: the first with both outcomes)")
    parser.add_argument("--list", action="store_true", help="one line per tree of the run")
    parser.add_argument("--full", action="store_true", help="all of every text")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page of all trees and curves (or of --update's trees)"
    )


def run(args: argparse.Namespace) -> int:
    source = RunSource(args.run)
    if args.list:
        for path in tree_files(args.run):
            for index, tree in enumerate(read(path)):
                print(f"--update {update_of(path)} --index {index}   {summary(tree)}")
        return 0
    (path,) = source.files_of(args.update)
    if args.html is not None:
        write_whole(args.html, source.page(args.update))
        print(args.html)
        return 0
    trees = read(path)
    index = _chosen_index(trees, args.index)
    print(f"update {update_of(path)}, tree {index} of {len(trees)}; credit of a token: {source.config.loss.advantage}")
    lines = None if args.full else 6
    shown = tree_text(trees[index], source.decode, source.credit(trees[index]), max_lines=lines)
    Console(file=sys.stdout, highlight=False).print(shown, soft_wrap=True, end="")
    return 0


def _chosen_index(trees: Sequence[RolloutTree], index: int | None) -> int:
    if index is None:
        return next((i for i, tree in enumerate(trees) if tree.has_both_outcomes), 0)
    if not 0 <= index < len(trees):
        raise ConfigError(f"--index {index}: there are {len(trees)} trees, from 0")
    return index
