"""The Ray Serve application: a student, its program in front of it, and how they are run.

``build`` is what ``serve deploy`` imports; ``run`` starts the same on this machine or the
connected cluster. A student alone, without HTTP, is for ``launch``.
"""

import contextlib
import os
import socket
import time
import urllib.request

import ray
import ray.serve
import yaml

from serve import deployments, running
from serve.errors import ConfigurationError, StudentError
from serve.files import absolute
from serve.program_server import read_api_key
from serve.student import Manifest, load_student

APP_NAME = "raydistill"
HEALTHY_TIMEOUT_S = 60


class AppArgs(deployments.Scale):
    """What an application is built from; the ``args`` of serve.yaml."""

    student: str
    """The student directory: a local path or an fsspec URI, such as ``s3://bucket/student``."""
    name: str = "student"
    """The model name at ``/v1``."""
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
    if Manifest.load(args.student).program is not None:
        load_student(args.student)


def _application(args: AppArgs) -> ray.serve.Application:
    student_dir = absolute(args.student)
    student = deployments.student(args, student_dir)
    return deployments.program(args, student, student_dir, args.name, args.api_key_env)


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
        running.connect(started)
        cpus = deployments.STUDENT_CPUS + deployments.PROGRAM_CPUS
        deployments.check_room(args.min_replicas, args, cpus, "serve.replicas.min")
        _check_http()
        running.start_serve(started, "HeadOnly", host=host, port=port)
        started.callback(running.delete, APP_NAME)
        running.deploy(_application(args), APP_NAME, "/", args.student)
        _wait_until_healthy(url)
        return Server(url, started.pop_all())


def _check_http() -> None:
    if not running.is_serving() or ray.serve.status().proxies:
        return
    if ray.serve.status().applications:
        raise ConfigurationError(
            "Ray Serve runs on this cluster without HTTP, as it does for launched students. Kill "
            "those first (lm.kill()), or serve on another cluster."
        )
    # Nobody uses it any more, and it cannot be given HTTP as it runs.
    ray.serve.shutdown()


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
