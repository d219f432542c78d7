"""The files of the viewer's page, put together by `trace_async.trees.page`."""
