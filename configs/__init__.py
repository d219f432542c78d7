"""The settings that come with the package, found by name by `trace_async.config.find_config`."""
