"""Serve the viewer on the loopback interface, so that it follows a run that is training.

A page of somebody else's, open in the same browser, must not read a run: requests for another host's name are refused
(DNS rebinding), and no answer carries a header that would let another origin read it.
"""

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler

from scripts.viewer.source import RunSource
from trace_async.config import ConfigError
from trace_async.trees.page import viewer_page
from trace_async.types import Json

HOST = "127.0.0.1"


def make_app(source: RunSource) -> web.Application:
    """Serve the page at `/`, and its data at `/api/run`, `/api/update/N` and `/api/curves`."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=viewer_page(source.config.name, None), content_type="text/html")

    async def run(request: web.Request) -> web.Response:
        return web.json_response(source.info())

    async def curves(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(source.curves))

    async def update(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        try:
            trees: list[Json] = await asyncio.to_thread(source.trees, number)
        except ConfigError as error:
            is_broken = number in source.updates()
            raise (web.HTTPInternalServerError if is_broken else web.HTTPNotFound)(text=str(error)) from error
        return web.json_response(trees)

    app = web.Application(middlewares=[_only_loopback])
    app.add_routes(
        [
            web.get("/", page),
            web.get("/api/run", run),
            web.get("/api/curves", curves),
            web.get(r"/api/update/{number:\d{1,9}}", update),
        ]
    )
    return app


@web.middleware
async def _only_loopback(request: web.Request, handler: Handler) -> web.StreamResponse:
    name = request.host.rpartition(":")[0] or request.host
    if name not in (HOST, "localhost"):
        raise web.HTTPForbidden(text="this page is served to this machine only: open it as http://127.0.0.1")
    response = await handler(request)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response


async def serve(source: RunSource, port: int) -> web.AppRunner:
    """Serve on `port` (0: any free one); returns what has to be cleaned up. Raises OSError where the port is taken."""
    runner = web.AppRunner(make_app(source), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner
