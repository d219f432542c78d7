"""One local Ray for the tests of this folder, ended before others start: their code would take itself for a driver."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """Actors load this project from the working directory."""
    import ray

    ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
