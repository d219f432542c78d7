"""The engine of docs/own/engine.md, named as a user names his own, passes the suite but for the cache it lacks."""

from tests.conformance.engine_conformance import EngineConformance


class TestOwnEngine(EngineConformance):
    backend = "docs.own.engine:TransformersEngine"
    prefix_cache = False
    long_answer = 60  # it computes every token's whole context
