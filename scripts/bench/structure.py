"""Count what a reader has to know of the code: rooms, lines and arrows, at any commit.

    python -m scripts.bench.structure [COMMIT]        without a commit: the files as they are

A *room* is a file or package directly under `trace_async`, `envs`, `actors` or `scripts`. An *arrow* goes from a room
to another room of the same folder that it imports. Lines are all lines of Python files, `__init__.py` included.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("trace_async", "envs", "actors", "scripts")


def sources(commit: str | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """The Python files of the four folders: parts of the path, text."""
    if commit is None:
        for folder in FOLDERS:
            for file in sorted((ROOT / folder).rglob("*.py")):
                yield file.relative_to(ROOT).with_suffix("").parts, file.read_text(encoding="utf-8")
        return
    packed = subprocess.run(["git", "archive", commit, *FOLDERS], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            if member.name.endswith(".py") and content is not None:
                yield Path(member.name).with_suffix("").parts, content.read().decode("utf-8")


def imported(text: str) -> Iterator[tuple[str, ...]]:
    """What a file imports, as parts of names; `from a import b` gives a.b, whether b is a module or not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    lines: dict[tuple[str, str], int] = defaultdict(int)
    files: dict[tuple[str, str], int] = defaultdict(int)
    arrows: dict[tuple[str, str], set[str]] = defaultdict(set)
    found = list(sources(parser.parse_args().commit))
    rooms = {(parts[0], parts[1]) for parts, _ in found if parts[1] != "__init__"}
    for parts, text in found:
        room = (parts[0], parts[1])
        lines[room] += text.count("\n")
        files[room] += 1
        targets = {name[:2] for name in imported(text) if len(name) > 1 and name[:2] in rooms}
        arrows[room] |= {target[1] for target in targets if target[0] == room[0]} - {room[1]}
    print_tables(lines, files, arrows)


def print_tables(
    lines: Mapping[tuple[str, str], int],
    files: Mapping[tuple[str, str], int],
    arrows: Mapping[tuple[str, str], set[str]],
) -> None:
    print("| folder | rooms | files | lines | arrows |\n|---|---:|---:|---:|---:|")
    for folder in FOLDERS:
        rooms = [room for room in lines if room[0] == folder]
        counts = (sum(counted[room] for room in rooms) for counted in (files, lines))
        num_rooms = sum(room[1] != "__init__" for room in rooms)
        print(
            f"| `{folder}` |", " | ".join(map(str, [num_rooms, *counts, sum(len(arrows[room]) for room in rooms)])), "|"
        )
    print("\n| room | files | lines | imports | imported by |\n|---|---:|---:|---:|---:|")
    for folder in FOLDERS:
        for room in sorted(room for room in lines if room[0] == folder and room[1] != "__init__"):
            by = sum(room[1] in arrows[other] for other in lines if other[0] == folder)
            print(f"| `{'.'.join(room)}` | {files[room]} | {lines[room]} | {len(arrows[room])} | {by} |")


if __name__ == "__main__":
    main()
