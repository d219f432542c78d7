"""trace_async: TRACE (Tree Rollout Allocation for Contrastive Exploration, arXiv 2606.11119), asynchronously.

This package holds every rule of the method and knows no Ray: it can be run and tested without a cluster.
Importing it loads no engine, no DeepSpeed and no Ray.
"""

__version__ = "0.1.0"
