"""The deployments that there are, how far each scales and what its replicas ask Ray for.

This is the only place where plain classes become Ray Serve deployments. Which of them make
an application, and how that is run, is for ``app`` and ``launch``.
"""

from typing import Annotated, Any, Literal

import ray
import ray.serve
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from serve import cluster
from serve.program_server import ProgramServer
from serve.student_server import StudentServer

# One batch runs while the next one gathers.
STUDENT_BATCHES_ONGOING = 2
PROGRAM_REQUESTS_ONGOING = 128

# What keeps a replica from starting is seldom gone at the next try.
CONSTRUCTOR_RETRIES = 2

# Together they fit a machine of two cores; Serve's own actors reserve none.
STUDENT_CPUS = 1
PROGRAM_CPUS = 0.5


class Scale(BaseModel):
    """How many replicas there are, and how much each takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    max_queued_requests: Annotated[int, Field(ge=1)] = 256
    """Requests that may wait for a replica; the next one is told to try again."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give each replica of the student a GPU; ``auto`` does where the cluster has one."""


def student(scale: Scale, student_dir: str) -> ray.serve.Application:
    """The student alone, reached by its handle."""
    return _deployment(
        StudentServer,
        scale,
        ongoing=STUDENT_BATCHES_ONGOING * scale.max_batch_size,
        resources={"num_cpus": STUDENT_CPUS, "num_gpus": int(_use_gpu(scale))},
        # As many threads as reserved cores: more of them only get into each other's way.
    ).bind(student_dir, scale.max_batch_size, STUDENT_CPUS)


def program(
    scale: Scale,
    behind: ray.serve.Application,
    student_dir: str,
    name: str,
    api_key_env: str | None,
) -> ray.serve.Application:
    """The student's program over HTTP, in front of the student."""
    return _deployment(
        ray.serve.ingress()(ProgramServer),
        scale,
        ongoing=PROGRAM_REQUESTS_ONGOING,
        resources={"num_cpus": PROGRAM_CPUS},
    ).bind(behind, student_dir, name, api_key_env, PROGRAM_REQUESTS_ONGOING)


def check_room(replicas: int, scale: Scale, cpus: float, setting: str) -> None:
    """See that the cluster has room for so many replicas.

    Args:
        replicas: How many students there will be at least.
        scale: Says whether each takes a GPU.
        cpus: What each takes, with all that belongs to it.
        setting: What names the number, as ``serve.replicas.min``.

    Raises:
        ConfigurationError: It has too few CPUs or GPUs.
    """
    needed = {"CPU": replicas * cpus, "GPU": float(replicas * _use_gpu(scale))}
    cluster.check_room(needed, f"{setting}={replicas}")


def _use_gpu(scale: Scale) -> bool:
    if scale.use_gpu == "auto":
        return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
    return scale.use_gpu


def _deployment(kind: Any, scale: Scale, ongoing: int, resources: dict[str, float]) -> Any:
    return ray.serve.deployment(
        kind,
        ray_actor_options=resources,
        max_ongoing_requests=ongoing,
        max_queued_requests=scale.max_queued_requests,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        backpressure_config=BackpressureConfig(retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=ongoing / 2,
        ),
    )
