"""Read what the viewer shows from a run's directory, also while the run goes on.

A run writes its trees one file an update, whole or not at all, so whoever reads beside it never sees half a file.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from scripts.start_policy import ensure_policy
from trace_async.config import Config, ConfigError, load_config
from trace_async.method.credit import compute_credit
from trace_async.policy.load import load_tokenizer
from trace_async.printable import printable
from trace_async.tracking.log import read_metrics
from trace_async.trees.io import heldout_files, read_trees, tree_files
from trace_async.trees.page import embedded, viewer_page
from trace_async.trees.payload import curves_payload, tree_payload
from trace_async.trees.text import Decode
from trace_async.trees.tree import RolloutTree
from trace_async.types import Json

MAX_PAGE_BYTES = 30_000_000
"""Of trees in one page; the newest updates come first. A browser opens that at once, an MLflow store does not mind."""

_CACHED_UPDATES = 64


class RunSource:
    """The run in `run_dir`: the trees of its updates, or with `heldout` the rollouts of its evaluations.

    Raises ConfigError where there is none.
    """

    def __init__(self, run_dir: Path, *, heldout: bool = False) -> None:
        config_file = run_dir / "config.yaml"
        if not config_file.is_file():
            raise ConfigError(f"{run_dir}: there is no run ({config_file} is missing)")
        self.run_dir = run_dir
        self.config: Config = load_config(config_file)
        self._list_files = heldout_files if heldout else tree_files
        self._cache: dict[tuple[Path, int], list[Json]] = {}

    def updates(self) -> list[int]:
        """Return the updates whose trees were kept, ascending."""
        return sorted({update_of(path) for path in self._list_files(self.run_dir)})

    def files_of(self, update: int | None) -> list[Path]:
        """Return the trees of an update (None: of the last that has any). Raises ConfigError naming those there are."""
        newest = max(self.updates(), default=None) if update is None else update
        files = [path for path in self._list_files(self.run_dir) if update_of(path) == newest]
        if not files:
            found = ", ".join(map(str, self.updates())) or "none"
            wanted = "" if update is None else f" of update {update}"
            raise ConfigError(f"{self.run_dir}: no trees{wanted} were kept (updates with trees: {found})")
        return files

    def info(self) -> dict[str, Json]:
        """Return what the page says about the run, and its updates."""
        budget = self.config.budget
        about = f"{self.config.env.name} · Stage 1 {budget.stage1}, Stage 2 {budget.stage2}, "
        about += (
            f"advantage {self.config.loss.advantage} · M = {budget.root_rollouts}, N = {budget.continuations_per_root}"
        )
        return {"name": printable(self.config.name), "about": printable(about), "updates": [*self.updates()]}

    def trees(self, update: int) -> list[Json]:
        """Return the trees of an update as the page shows them. Raises as `files_of` and `read` do."""
        return [tree for path in self.files_of(update) for tree in self._payloads(path)]

    def _payloads(self, path: Path) -> list[Json]:
        key = path, path.stat().st_mtime_ns
        if key not in self._cache:
            if len(self._cache) >= _CACHED_UPDATES:
                self._cache.pop(next(iter(self._cache)))
            stage2 = self.config.budget.stage2
            self._cache[key] = [
                tree_payload(tree, self.decode, self.credit(tree), stage2=stage2) for tree in read(path)
            ]
        return self._cache[key]

    def curves(self) -> dict[str, Json]:
        return curves_payload(read_metrics(self.run_dir))

    def page(self, update: int | None = None, *, max_bytes: int = MAX_PAGE_BYTES) -> str:
        """One self-contained page: of one update, or of as many of the newest as `max_bytes` holds (at least one)."""
        wanted = [update] if update is not None else self.updates()[::-1]
        kept: list[Json] = []
        size = 0
        for number in wanted:
            shown: dict[str, Json] = {"update": number, "trees": self.trees(number)}
            size += len(embedded(shown))
            if kept and size > max_bytes:
                break
            kept.append(shown)
        updates: list[Json] = [*wanted[: len(kept)][::-1]]
        left_out = f"{len(wanted) - len(kept)} older updates: trace-async view" if len(kept) < len(wanted) else ""
        info = self.info() | {"updates": updates, "left_out": left_out, "curves": self.curves()}
        return viewer_page(str(info["name"]), {"run": info, "updates": kept[::-1]})

    def credit(self, tree: RolloutTree) -> list[float]:
        """Per node, what one of its generated tokens counts with in the gradient of the first, unclipped step."""
        loss = self.config.loss
        credit = compute_credit(loss.advantage, tree, normalize_std=loss.normalize_std)
        return [float(value) for value in credit.positive + credit.negative]

    @cached_property
    def decode(self) -> Decode:
        trained = self.run_dir / "policy"
        return decoder(trained if (trained / "config.json").is_file() else ensure_policy(self.config))


def decoder(policy: Path) -> Decode:
    """Return what shows tokens of the policy in the folder `policy` as text, control tokens included."""
    tokenizer = load_tokenizer(policy)

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def read(path: Path) -> list[RolloutTree]:
    """Return the trees of a file. Raises ConfigError naming file and line where it is broken, or of another version."""
    try:
        return list(read_trees(path))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def update_of(path: Path) -> int:
    return int(path.stem.split("_")[1])  # update_000010 or heldout_000010_t1.0
