"""Hand MLflow what its pages show besides figures: rollouts as traces, datasets, the policy as a model.

MLflow keeps one tracking address for a whole process, and sends traces and models there. The address is set for as
long as this takes, and then put back.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trace_async.config import Config, config_to_yaml
from trace_async.tracking.records import DatasetRecord, RolloutRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "policy"
_ADDRESS = threading.Lock()


@contextmanager
def tracking_address(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's own address inside; one thread at a time."""
    import mlflow

    with _ADDRESS:
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def log_trace(uri: str, rollout: RolloutRecord, client: "MlflowClient", run_id: str) -> None:
    """Log the rollout as a trace of the run: a span for each turn of the policy and one for what came back.

    Its times are those at which it is logged.
    """
    experiment = client.get_run(run_id).info.experiment_id
    with tracking_address(uri):
        trace_id = _send(client, experiment, run_id, rollout)
        client.get_trace(trace_id, display=False)  # what sends it only warns when the store does not take it


def _send(client: "MlflowClient", experiment: str, run_id: str, rollout: RolloutRecord) -> str:
    tags = {
        "update": str(rollout.update),
        "task": rollout.task_id[:250],
        "domain": rollout.domain[:250],
        "rollout": rollout.kind,
        "reward": f"{rollout.reward:g}",
    }
    root = client.start_trace(
        f"rollout of {rollout.domain}",
        span_type="AGENT",
        inputs={"prompt": rollout.prompt},
        tags=tags,
        experiment_id=experiment,
        run_id=run_id,
    )
    for number, turn in enumerate(rollout.turns, start=1):
        tokens = {
            "input_tokens": turn.num_prompt_tokens,
            "output_tokens": turn.num_generated,
            "total_tokens": turn.num_prompt_tokens + turn.num_generated,
        }
        figures = {name: value for name, value in turn.figures.items() if value is not None}
        if turn.said:
            span = client.start_span(
                f"turn {number}",
                trace_id=root.trace_id,
                parent_id=root.span_id,
                span_type="LLM",
                attributes={**figures, "mlflow.chat.tokenUsage": tokens},
            )
            client.end_span(root.trace_id, span.span_id, outputs=turn.said)
        if turn.observation:
            kind = "TOOL" if turn.said else "CHAIN"
            name = "observation" if turn.said else "context"
            span = client.start_span(name, trace_id=root.trace_id, parent_id=root.span_id, span_type=kind)
            client.end_span(root.trace_id, span.span_id, outputs=turn.observation)
    client.end_trace(root.trace_id, outputs={"reward": rollout.reward, **rollout.metrics})
    return str(root.trace_id)


def log_datasets(datasets: Sequence[DatasetRecord], client: "MlflowClient", run_id: str) -> None:
    """Log the run's datasets, by the name of the environment."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            dataset=Dataset(
                name=dataset.name,
                digest=dataset.digest,
                source_type="trace_async",
                source=dataset.source,
                profile=json.dumps({"num_tasks": dataset.num_tasks}),
            ),
            tags=[InputTag("mlflow.data.context", dataset.use)],
        )
        for dataset in datasets
    ]
    client.log_inputs(run_id, inputs)


def log_policy(uri: str, run_id: str, config: Config, folder: Path) -> None:
    """Log the policy in `folder` as a model of the run: `mlflow.transformers.load_model` gives a pipeline."""
    import mlflow
    from mlflow.models import infer_signature
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts = {
        "model": AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
    }
    with tracking_address(uri), mlflow.start_run(run_id=run_id):
        mlflow.transformers.log_model(
            transformers_model=parts,
            name=MODEL_NAME,
            task="text-generation",
            signature=infer_signature("text", "text that goes on from it"),
            # Looked up by MLflow otherwise, by loading the model once more.
            pip_requirements=["torch", "transformers"],
            metadata={"config": config_to_yaml(config), "policy_dir": str(folder)},
            params={"env.name": config.env.name, "policy.path": config.policy.path, "seed": str(config.seed)},
        )
