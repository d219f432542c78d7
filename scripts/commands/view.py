"""`trace-async view RUN`: look at a run's rollout trees and curves in a browser, also while it trains."""

import argparse
import asyncio
import webbrowser
from pathlib import Path

from scripts.viewer.source import RunSource
from trace_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--heldout", action="store_true", help="its held-out rollouts in place of those trained on")
    parser.add_argument("--port", type=int, default=8123, help="port on the loopback interface (0: any free one)")
    parser.add_argument("--open", action="store_true", help="open a browser")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: 0 to 65535")
    source = RunSource(args.run, heldout=args.heldout)
    _ = source.decode  # what needs a while, or goes wrong, does so before the page is announced
    asyncio.run(_serve(source, args.port, open_browser=args.open))
    return 0


async def _serve(source: RunSource, port: int, *, open_browser: bool) -> None:
    from scripts.viewer.server import HOST, serve

    try:
        runner = await serve(source, port)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; --port 0 takes any free one") from error
    url = f"http://{HOST}:{runner.addresses[0][1]}/"
    print(f"{url}  (Ctrl-C ends it; from another machine: ssh -L {runner.addresses[0][1]}:{HOST}:PORT)", flush=True)
    if open_browser:
        webbrowser.open(url)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
