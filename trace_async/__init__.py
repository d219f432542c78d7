"""trace_async: TRACE (Tree Rollout Allocation for Contrastive Exploration, arXiv 2606.11119), asynchronously.

This package holds every rule of the method and knows no Ray: it can be run and tested without a cluster.
Importing it loads no engine, no DeepSpeed and no Ray.

    from trace_async import TraceConfig

    algo = TraceConfig().environment("multihop").training(num_updates=10).build()
    result = algo.train()
"""

from typing import Any

__version__ = "0.1.0"

_API = {
    "TraceConfig": "scripts.api.config",
    "Callbacks": "scripts.api.config",
    "TraceAlgorithm": "scripts.api.algorithm",
}


def __getattr__(name: str) -> Any:
    """The Python API stands on top of all packages, so it is imported when it is asked for, and only then."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_API[name]), name)
