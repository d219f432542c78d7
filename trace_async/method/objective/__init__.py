"""What a token gains by its ratio: the part of the loss in which trainers differ. One objective a file, by name."""

from trace_async.method.objective.rule import Objective

__all__ = ["Objective"]
