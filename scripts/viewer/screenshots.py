"""Pictures of what a user sees, for the documentation: made by a script, so that they can be made again.

    python -m scripts.viewer.screenshots RUN docs/screenshots [--only terminal,trees,mlflow,ray]

RUN is the folder of a run that has ended. Ray's dashboard needs something to show: a cluster on this machine and a few
updates of the quickstart are started for it, and ended. Needs Chromium (apt-get install chromium) and Playwright.
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from trace_async.config import Config, ConfigError, load_config
from trace_async.engines.servers.server import free_port
from trace_async.tracking.log import read_metrics
from trace_async.tracking.mlflow_tracker import saved_run_id, tracking_uri
from trace_async.tracking.progress import Progress

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu")
WAIT_S = 180.0
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def browser_page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise ConfigError("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser.new_page(viewport={"width": 1300, "height": 760})
        browser.close()


@contextlib.contextmanager
def served(command: list[str], url: str, **variables: str) -> Iterator[None]:
    """The command runs within the block, from when `url` answers on. `variables`: of its environment."""
    nowhere = subprocess.DEVNULL
    server = subprocess.Popen(command, env=os.environ | variables, stdout=nowhere, stderr=nowhere)
    try:
        until(lambda: _answers(url), f"{' '.join(command)} does not answer at {url}")
        yield
    finally:
        server.terminate()
        server.wait()


def until(happened: Callable[[], bool], otherwise: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > limit:
            raise TimeoutError(otherwise)
        time.sleep(0.5)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url):
        return True
    return False


def shoot(
    page: Any, url: str, target: Path, *, wait_for: str = "body", settle_s: float = 1.0, search: str = ""
) -> None:
    page.goto(url)
    page.wait_for_selector(wait_for, timeout=1000 * WAIT_S)
    if search:
        page.locator(wait_for).first.fill(search)
    page.wait_for_timeout(1000 * settle_s)  # curves are drawn after what they are waited for
    page.screenshot(path=str(target))


def terminal(run: Path, target: Path) -> None:
    """The table that a run shows, as it stood half way."""
    config = load_config(run / "config.yaml")
    points = read_metrics(run)
    shown = points[: len(points) // 2 + 1]
    times = [shown[0].time]
    progress = Progress(
        config.num_updates,
        token_budget=config.max_generated_tokens,
        console=Console(file=io.StringIO()),
        clock=lambda: times[-1],
    )
    for point in shown:
        times.append(point.time)
        progress.update(point.step, point.metrics)
    progress.phase(["wait_for_trees"])
    console = Console(record=True, force_terminal=True, width=120, file=io.StringIO())
    console.print(progress.table())
    with tempfile.TemporaryDirectory() as folder, browser_page() as page:
        file = Path(folder) / "terminal.html"
        file.write_text(console.export_html(inline_styles=True), encoding="utf-8")
        page.set_viewport_size({"width": 1260, "height": 220})
        shoot(page, file.as_uri(), target)


def trees(run: Path, target: Path) -> None:
    from scripts.viewer.source import RunSource

    shown = RunSource(run).page()  # before Playwright's loop begins: it may have to look for the start policy
    with tempfile.TemporaryDirectory() as folder, browser_page() as page:
        file = Path(folder) / "trees.html"
        file.write_text(shown, encoding="utf-8")
        shoot(page, file.as_uri(), target, wait_for=".row")


def mlflow(run: Path, target: Path) -> None:
    config, run_id = load_config(run / "config.yaml"), saved_run_id(run)
    if run_id is None:
        raise ConfigError(f"{run} was not logged to MLflow (tracking.mlflow)")
    url = f"http://127.0.0.1:{(port := free_port())}"
    uri = tracking_uri(config)
    command = [str(BIN / "mlflow"), "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    with served(command, url), browser_page() as page:
        address = f"{url}/#/experiments/{_experiment(config, run_id)}/runs/{run_id}/model-metrics"
        charts = "input[placeholder='Search metric charts']"
        shoot(page, address, target, wait_for=charts, settle_s=15.0, search="train/")


def _experiment(config: Config, run_id: str) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri(config)).get_run(run_id).info.experiment_id)


def ray(run: Path, target: Path) -> None:
    """The actors' page, while a short run of the same config works on a cluster of its own."""
    port, dashboard = free_port(), free_port()
    head = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=8", "--disable-usage-stats"]
    head += ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += ["--node-ip-address=127.0.0.1"]  # it asks for no token, which the browser could not give: nobody else may
    # Ended by its own process: `ray stop` would end every other cluster of this machine too.
    no_token = {"RAY_AUTH_MODE": "disabled"}
    with served(head, f"http://127.0.0.1:{dashboard}", **no_token), tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}", "name=quickstart", f"actors.ray_address=127.0.0.1:{port}"]
        settings += ["num_updates=1000", "eval.num_tasks=8", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        command = [sys.executable, "-m", "scripts.cli", "train", "--config", str(run / "config.yaml"), *settings]
        training = subprocess.Popen(command, env=os.environ | no_token, stdout=subprocess.DEVNULL)
        try:
            made = Path(folder) / "quickstart"
            until(lambda: sum(p.step > 0 for p in read_metrics(made)) >= 3, "no update was made")
            with browser_page() as page:
                shoot(page, f"http://127.0.0.1:{dashboard}/#/actors", target, wait_for="table", settle_s=10.0)
        finally:
            training.terminate()
            training.wait()


PICTURES: dict[str, Callable[[Path, Path], None]] = {"terminal": terminal, "trees": trees, "mlflow": mlflow, "ray": ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PICTURES))
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PICTURES]:
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(PICTURES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        PICTURES[name](args.run, args.folder / f"{name}.png")
        print(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
