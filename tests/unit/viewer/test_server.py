"""The viewer's server: a run's data for this machine only, as they are on disk."""

from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from scripts import cli
from scripts.viewer.server import make_app
from scripts.viewer.source import RunSource
from tests.support.shown_run import ShownRun
from trace_async.trees.io import heldout_path, write_trees

TestClient.__test__ = False
TestServer.__test__ = False


@pytest.fixture
def shown(tmp_path: Path) -> ShownRun:
    run = ShownRun(tmp_path)
    run.write(1, [run.lost("q1")])
    run.write_curves([0.5])
    return run


async def test_it_serves_the_run_as_it_is_on_disk(shown: ShownRun) -> None:
    async with TestClient(TestServer(make_app(RunSource(shown.directory)))) as client:
        page = await (await client.get("/")).text()
        assert '<script type="application/json" id="data">null</script>' in page
        info = await (await client.get("/api/run")).json()
        assert (info["name"], info["updates"]) == ("shown", [1])
        assert await (await client.get("/api/curves")).json() == {"train/reward": [[1], [0.5]]}
        assert [tree["task"] for tree in await (await client.get("/api/update/1")).json()] == ["q1"]
        shown.write(1, [shown.lost("q2")])  # as a resumed run does
        assert [tree["task"] for tree in await (await client.get("/api/update/1")).json()] == ["q2"]
        shown.write(2, [shown.tree()])
        assert (await (await client.get("/api/run")).json())["updates"] == [1, 2]


async def test_it_shows_the_rollouts_of_evaluations_in_place_of_those_trained_on(shown: ShownRun) -> None:
    for temperature, task in ((0.0, "greedy"), (1.0, "sampled")):
        write_trees(heldout_path(shown.directory, 4, temperature), [shown.lost(task)])
    source = RunSource(shown.directory, heldout=True)
    async with TestClient(TestServer(make_app(source))) as client:
        assert (await (await client.get("/api/run")).json())["updates"] == [4]
        assert [t["task"] for t in await (await client.get("/api/update/4")).json()] == ["greedy", "sampled"]
        assert (await client.get("/api/update/1")).status == 404
    assert RunSource(shown.directory).updates() == [1]


async def test_what_is_not_there_is_named(shown: ShownRun) -> None:
    async with TestClient(TestServer(make_app(RunSource(shown.directory)))) as client:
        answer = await client.get("/api/update/7")
        assert answer.status == 404
        assert "no trees of update 7 were kept (updates with trees: 1)" in await answer.text()
        for path in ("/api/update/x", "/api/update/..%2F1", "/config.yaml", "/../config.yaml"):
            assert (await client.get(path)).status == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8123", "127.0.0.1.evil.example", "[::1]:80"])
async def test_a_page_of_another_origin_cannot_read_it_by_another_name(shown: ShownRun, host: str) -> None:
    async with TestClient(TestServer(make_app(RunSource(shown.directory)))) as client:
        answer = await client.get("/api/run", headers={"Host": host})
        assert answer.status == 403
        allowed = await client.get("/api/run", headers={"Origin": "http://evil.example"})
        assert "Access-Control-Allow-Origin" not in allowed.headers


async def test_a_broken_file_of_trees_is_named_and_ends_nothing(shown: ShownRun) -> None:
    (shown.directory / "trees" / "update_000002.jsonl").write_text("{}\n")
    async with TestClient(TestServer(make_app(RunSource(shown.directory)))) as client:
        answer = await client.get("/api/update/2")
        assert answer.status == 500
        assert "update_000002.jsonl:1" in await answer.text()
        assert (await client.get("/api/update/1")).status == 200


def test_the_oldest_updates_are_left_out_of_a_page_that_would_be_too_large(shown: ShownRun) -> None:
    for update in (2, 3):
        shown.write(update, [shown.lost(f"q{update}")])
    source = RunSource(shown.directory)
    whole, small = source.page(), source.page(max_bytes=1)
    assert '"updates":[1,2,3],"left_out":""' in whole
    assert '"updates":[3],"left_out":"2 older updates: trace-async view"' in small
    assert len(small) < len(whole)


def test_a_broken_file_of_trees_is_an_error_in_words(shown: ShownRun, capsys: pytest.CaptureFixture[str]) -> None:
    (shown.directory / "trees" / "update_000001.jsonl").write_text('{"format": 1}\n')
    for arguments in ([], ["--list"], ["--html", str(shown.directory / "page.html")]):
        assert cli.main(["tree", str(shown.directory), *arguments]) == 2
        assert "update_000001.jsonl:1: tree: format 1 is not" in capsys.readouterr().err


def test_wrong_arguments_are_explained(shown: ShownRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["view", str(shown.directory / "nowhere")]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert cli.main(["view", str(shown.directory), "--port", "70000"]) == 2
    assert "--port 70000: 0 to 65535" in capsys.readouterr().err
