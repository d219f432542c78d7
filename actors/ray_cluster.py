"""Connect a run to Ray, and check that Ray has room for everything that the run will start.

This is a local Ray, or the cluster at `actors.ray_address`.
"""

import asyncio
import logging
import math
import os
import socket
import tempfile
from collections.abc import Mapping

import grpc
import ray

# Ray has no public call for it; `ray start` and `ray job` use this one.
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.calls import ask_all
from trace_async.config import Config, ConfigError
from trace_async.run.placement import place

MAX_SOCKET_PATH = 107
NODE_LIMIT_S = 10.0
CONNECT_LIMIT_S = 10.0

# Resource → (the settings that ask for it → how much they ask for).
Asked = Mapping[str, Mapping[str, float]]


def asked_of_ray(config: Config, *, only_generators: bool = False) -> Asked:
    """Return what a run asks of Ray. PromptActors ask for nothing, because they wait most of the time."""
    actors, learner = config.actors, config.learner
    cpus = {"actors.num_generators × actors.generator_cpus": actors.num_generators * actors.generator_cpus}
    gpus = {"actors.num_generators × actors.generator_gpus": actors.num_generators * actors.generator_gpus}
    if not only_generators:
        cpus["learner.num_ranks × learner.num_threads"] = learner.num_ranks * learner.num_threads
        gpus["learner.num_ranks × actors.learner_gpus"] = learner.num_ranks * actors.learner_gpus
        num_predictors = 1 + config.predictor.num_replicas
        cpus["(1 + predictor.num_replicas) × predictor.num_threads"] = num_predictors * config.predictor.num_threads
        gpus["(1 + predictor.num_replicas) × actors.predictor_gpus"] = num_predictors * actors.predictor_gpus
    return {"CPU": cpus, "GPU": gpus}


def start_ray(config: Config, *, only_generators: bool = False) -> Config:
    """Connect this process to Ray. Returns the settings as placed on what Ray has (`trace_async.run.placement`).

    Raises ConfigError when Ray has too little for the run; without this check the run would wait for it without end. A
    local Ray is told that it has as many CPUs as are asked for, so on few cores they are shared. Ray's own logs stay in
    the folder of its session.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray hides all GPUs from actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.actors.ray_address
    if address:
        join_cluster(address)
    else:
        _require_short_paths()
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _cpus_with_room_to_grow(config, only_generators=only_generators)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        there = ray.cluster_resources()
        placed = place(config, there.get("GPU", 0.0), only_generators=only_generators)
        asked = asked_of_ray(placed, only_generators=only_generators)
        require_room(asked, there, f"the Ray cluster at {address}" if address else "this machine")
    except ConfigError:
        ray.shutdown()
        raise
    return placed


def join_cluster(address: str) -> None:
    """Connect to a cluster that is up. Raises ConfigError when there is none that would have us.

    `ray start` asks for a token where one lies in ~/.ray, as after any local run; `ray.init` shows it only when told.
    A cluster without tokens must not be shown one: we would ask its servers for it in turn, and they have none.
    """
    _require_listener(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if _asks_for_token(address):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError) as error:
        raise ConfigError(
            f"actors.ray_address={address}: {str(error).splitlines()[0]}. Is it a head of Ray {ray.__version__}, and, "
            "if it asks for a token, does ~/.ray/auth_token (or RAY_AUTH_TOKEN) hold the cluster's?"
        ) from error


def _require_listener(address: str) -> None:
    """Raise ConfigError where nobody listens: Ray itself would try for minutes."""
    where = _host_and_port(address)
    if where is None:
        return
    try:
        socket.create_connection(where, timeout=CONNECT_LIMIT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"actors.ray_address={address}: no Ray cluster answers there ({error}); `ray start --head` starts one"
        ) from error


def _asks_for_token(address: str) -> bool:
    """Return whether the cluster wants to be shown a token: False only where its head answers one who shows none."""
    if _host_and_port(address) is None:
        return True  # there is no telling
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=CONNECT_LIMIT_S)
        except grpc.RpcError:
            return True
    return False


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Return the two parts of HOST:PORT; None for "auto", "local" and URLs."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if port.isdigit() and "/" not in host else None


def _cpus_with_room_to_grow(config: Config, *, only_generators: bool) -> int:
    """Return the CPUs of a run, with those of the generators that it may add to the ones that it starts with."""
    asked = asked_of_ray(config, only_generators=only_generators)
    more_generators = config.actors.most_generators - config.actors.num_generators
    return math.ceil(sum(asked["CPU"].values()) + more_generators * config.actors.generator_cpus)


def _require_short_paths() -> None:
    """Raise ConfigError when the sockets of a local Ray would have longer paths than the system allows (107 bytes)."""
    folder = os.path.join(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
    session = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
    if len(f"{folder}/{session}".encode()) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"Ray would make its sockets under {folder}, and their paths would be longer than {MAX_SOCKET_PATH} bytes: "
            "set the environment variable RAY_TMPDIR to a short path, such as /tmp"
        )


async def on_draining_nodes(actors: Mapping[str, ActorHandle]) -> set[str]:
    """Return the names of those on nodes that Ray is about to take away (autoscaler, spot notice, `ray drain-node`).

    They still work, until the node's deadline; nothing new is placed there. One that does not answer is not named.
    """
    if not ray.is_initialized():
        return set()
    # Ray has no public call for it; its own libraries use this one.
    draining = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
    if not draining:
        return set()
    asked = [actor.__ray_call__.remote(_own_node) for actor in actors.values()]
    nodes = await ask_all(asked, who=list(actors), limit_s=NODE_LIMIT_S)
    return {name for name, node in zip(actors, nodes, strict=True) if isinstance(node, str) and node in draining}


def _own_node(actor: object) -> str:
    """Return the id of the actor's node; this runs in the actor."""
    return str(ray.get_runtime_context().get_node_id())


def require_room(asked: Asked, there: Mapping[str, float], place: str) -> None:
    """Raise ConfigError when `there`, Ray's resources by name, is less than what is asked for."""
    for resource, shares in asked.items():
        total = sum(shares.values())
        if total > there.get(resource, 0.0):
            parts = ", ".join(f"{share:g} by {setting}" for setting, share in shares.items() if share)
            raise ConfigError(
                f"{place} has {there.get(resource, 0.0):g} {resource}s, and {total:g} are asked for: {parts}"
            )
