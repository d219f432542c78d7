"""`trace-async tree RUN`: one rollout tree of a run with outcomes, values and credits by node, as text or a page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scripts.commands.train import ensure_policy
from trace_async.config import Config, ConfigError, load_config
from trace_async.policy.load import load_tokenizer
from trace_async.trees.io import read_trees, tree_files
from trace_async.trees.page import TreeSection, trees_page
from trace_async.trees.text import Decode, summary, tree_text
from trace_async.trees.tree import RolloutTree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--update", type=int, help="trees of this update (default: the last with any)")
    parser.add_argument("--index", type=int, help="which tree of it, from 0 (default: the first with both outcomes)")
    parser.add_argument("--list", action="store_true", help="one line per tree of the run")
    parser.add_argument("--full", action="store_true", help="all of every text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all trees of the update as a page")


def run(args: argparse.Namespace) -> int:
    config_file = args.run / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(f"{args.run}: there is no run ({config_file} is missing)")
    if args.list:
        for path in tree_files(args.run):
            for index, tree in enumerate(read_trees(path)):
                print(f"--update {_update_of(path)} --index {index}   {summary(tree)}")
        return 0
    config = load_config(config_file)
    path = _chosen_file(args.run, args.update)
    trees = list(read_trees(path))
    decode = _decoder(args.run, config)
    if args.html is not None:
        sections = [
            TreeSection(f"Tree {index}: {tree.task.id}", tree, _credit(tree, config))
            for index, tree in enumerate(trees)
        ]
        title = f"Rollout trees of {config.name}, update {_update_of(path)}"
        args.html.write_text(trees_page(title, sections, decode), encoding="utf-8")
        print(args.html)
        return 0
    index = _chosen_index(trees, args.index)
    print(f"update {_update_of(path)}, tree {index} of {len(trees)}; credit of a token: {config.loss.advantage}")
    shown = tree_text(trees[index], decode, _credit(trees[index], config), max_lines=None if args.full else 6)
    Console(file=sys.stdout, highlight=False).print(shown, soft_wrap=True, end="")
    return 0


def _chosen_file(run_dir: Path, update: int | None) -> Path:
    files = [path for path in tree_files(run_dir) if update is None or _update_of(path) == update]
    if not files:
        found = ", ".join(str(_update_of(path)) for path in tree_files(run_dir)) or "none"
        wanted = "" if update is None else f" of update {update}"
        raise ConfigError(f"{run_dir}: no trees{wanted} were kept (updates with trees: {found})")
    return files[-1]


def _chosen_index(trees: Sequence[RolloutTree], index: int | None) -> int:
    if index is None:
        return next((i for i, tree in enumerate(trees) if tree.has_both_outcomes), 0)
    if not 0 <= index < len(trees):
        raise ConfigError(f"--index {index}: there are {len(trees)} trees, from 0")
    return index


def _credit(tree: RolloutTree, config: Config) -> list[float]:
    """Per node, what one of its generated tokens counts with in the gradient of the first, unclipped step."""
    from trace_async.method.credit import compute_credit

    credit = compute_credit(config.loss.advantage, tree, normalize_std=config.loss.normalize_std)
    return [float(value) for value in credit.positive + credit.negative]


def _decoder(run_dir: Path, config: Config) -> Decode:
    trained = run_dir / "policy"
    tokenizer = load_tokenizer(trained if (trained / "config.json").is_file() else ensure_policy(config))

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def _update_of(path: Path) -> int:
    return int(path.stem.removeprefix("update_"))
