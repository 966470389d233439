"""The Ray Serve application: what is deployed, with which resources, and how it is run.

``build`` is what ``serve deploy`` imports; ``run`` starts the same on this machine or the
connected cluster. This is the only place where plain classes become deployments.
"""

import contextlib
import logging
import os
import socket
import time
import urllib.request
from typing import Annotated, Any, Literal

import ray
import ray.serve
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serve import cluster
from serve.errors import ConfigurationError, StudentError
from serve.files import absolute
from serve.program_server import ProgramServer, read_api_key
from serve.student import load_student
from serve.student_server import StudentServer

logger = logging.getLogger(__name__)

APP_NAME = "raydistill"
HEALTHY_TIMEOUT_S = 60

# One batch runs while the next one gathers.
STUDENT_BATCHES_ONGOING = 2
PROGRAM_REQUESTS_ONGOING = 128

# What keeps a replica from starting is seldom gone at the next try.
CONSTRUCTOR_RETRIES = 2

# Together they fit a machine of two cores; Serve's own actors reserve none.
STUDENT_CPUS = 1
PROGRAM_CPUS = 0.5


class AppArgs(BaseModel):
    """What an application is built from; the ``args`` of serve.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    """The student directory: a local path or an fsspec URI, such as ``s3://bucket/student``."""
    name: str = "student"
    """The model name at ``/v1``."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    max_queued_requests: Annotated[int, Field(ge=1)] = 256
    """Requests that may wait for a replica; the next one is told to try again."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give each replica of the student a GPU; ``auto`` does where the cluster has one."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key callers must send."""


def build(args: AppArgs) -> ray.serve.Application:
    """The application for a student directory.

    Raises:
        StudentError: The directory does not hold a student, or its program does not load.
        ConfigurationError: The API key's variable is not set.
    """
    _check(args)
    return _application(args)


def _check(args: AppArgs) -> None:
    """Find here and now what would otherwise fail on a replica, again and again."""
    read_api_key(args.api_key_env)
    load_student(args.student)


def _application(args: AppArgs) -> ray.serve.Application:
    student_dir = absolute(args.student)
    student = _deployment(
        StudentServer,
        args,
        ongoing=STUDENT_BATCHES_ONGOING * args.max_batch_size,
        resources={"num_cpus": STUDENT_CPUS, "num_gpus": int(_use_gpu(args))},
        # As many threads as reserved cores: more of them only get into each other's way.
    ).bind(student_dir, args.max_batch_size, STUDENT_CPUS)
    return _deployment(
        ray.serve.ingress()(ProgramServer),
        args,
        ongoing=PROGRAM_REQUESTS_ONGOING,
        resources={"num_cpus": PROGRAM_CPUS},
    ).bind(student, student_dir, args.name, args.api_key_env, PROGRAM_REQUESTS_ONGOING)


def _use_gpu(args: AppArgs) -> bool:
    if args.use_gpu == "auto":
        return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
    return args.use_gpu


def _check_room(args: AppArgs) -> None:
    least = args.min_replicas
    needed = {"CPU": least * (STUDENT_CPUS + PROGRAM_CPUS), "GPU": least * _use_gpu(args)}
    cluster.check_room(needed, f"serve.replicas.min={least}")


def _deployment(kind: Any, args: AppArgs, ongoing: int, resources: dict[str, float]) -> Any:
    return ray.serve.deployment(
        kind,
        ray_actor_options=resources,
        max_ongoing_requests=ongoing,
        max_queued_requests=args.max_queued_requests,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        backpressure_config=BackpressureConfig(retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=ongoing / 2,
        ),
    )


class Server:
    """A running application.

    Attributes:
        url: Where it answers.
    """

    def __init__(self, url: str, started: contextlib.ExitStack) -> None:
        self.url = url
        self._started = started

    def close(self) -> None:
        """Stop the application, and Serve and Ray as well if they were started for it."""
        self._started.close()


def run(args: AppArgs, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """Serve a student; returns once it answers.

    Uses the Ray that this process is connected to, else ``RAY_ADDRESS``, else starts one.
    Whatever ends it before it returns, what it has started is stopped.

    Raises:
        ConfigurationError: The port is taken, the API key's variable is not set, or the
            cluster has too few CPUs or GPUs.
        StudentError: The student cannot be loaded or does not come to answer.
    """
    _check_port(host, port)
    _check(args)
    url = _url(host, port)
    with contextlib.ExitStack() as started:
        if not ray.is_initialized():
            started.callback(ray.shutdown)
            cluster.connect()
        _check_room(args)
        if not ray.serve.status().proxies:
            started.callback(_stop_serve)
        started.callback(_delete)
        try:
            ray.serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config=_quiet(),
            )
            application = _application(args)
            ray.serve.run(application, name=APP_NAME, route_prefix="/", logging_config=_quiet())
            _wait_until_healthy(url)
        except (RuntimeError, RayServeException) as error:
            raise StudentError(f"{args.student}: cannot be served: {_reason(error)}") from error
        return Server(url, started.pop_all())


def _delete() -> None:
    if APP_NAME in ray.serve.status().applications:
        ray.serve.delete(APP_NAME)


def _stop_serve() -> None:
    # Somebody else may have deployed to it since.
    if not ray.serve.status().applications:
        ray.serve.shutdown()


def _reason(error: BaseException) -> str:
    """What kept the replicas from starting, where Serve knows; else the error itself."""
    application = ray.serve.status().applications.get(APP_NAME)
    deployments = application.deployments.values() if application else ()
    messages = [deployment.message.strip() for deployment in deployments if deployment.message]
    # A message may hold the replica's traceback, whose last line names the error.
    return "; ".join(message.splitlines()[-1] for message in messages) or str(error)


def serve_yaml(args: AppArgs, host: str = "127.0.0.1", port: int = 8000) -> str:
    """The text of a serve.yaml, ready for ``serve deploy``."""
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": args.model_dump(),
            }
        ],
    }
    return yaml.safe_dump(config, sort_keys=False)


def _check_port(host: str, port: int) -> None:
    # A cluster that serves already listens there itself, and takes another application.
    if ray.serve.status().proxies if ray.is_initialized() else os.environ.get("RAY_ADDRESS"):
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error}). Choose another with --port."
            ) from None


def _quiet() -> LoggingConfig:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on the host."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _wait_until_healthy(url: str) -> None:
    # A proxy that the environment names for HTTP must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + HEALTHY_TIMEOUT_S
    answer = "nothing"
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/healthz", timeout=15):
                return
        except OSError as error:
            answer = str(error)
        time.sleep(0.2)
    raise StudentError(
        f"{url}/healthz does not become healthy ({answer}). If Serve already runs on this "
        "cluster with another host or port, use those."
    )
