"""The tickets example from nothing to an answer over HTTP; what ``make demo`` runs.

    python -m examples.tickets.demo

Owns the order of the steps and the processes it starts: the stand-in teacher, the
``raydistill`` command line and the served student, each stopped by its own handle whatever
happens. All work is done by the command line, as it would be for any other program.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from examples.tickets.generate import NO_ORDER, Ticket, read_tickets, write_splits
from examples.tickets.program import FIELDS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/tickets/config.yaml"
DATA = Path("runs/tickets-data")
RUN = Path("runs/tickets")

STOP_S = 60

# Everything here talks to this machine only, whatever proxy the shell is set up with.
_ENVIRONMENT = {"OPENAI_API_KEY": "not-a-key", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoFailed(Exception):
    """A step did not do what it should; the message says which."""


def main() -> int:
    """Run the demo; returns the exit code."""
    # The processes started here run in groups of their own, so that a signal reaches this
    # process only and each of them is stopped in its turn.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.chdir(ROOT)
    try:
        tickets = _make_data()
        with _process("examples.tickets.teacher", "--data", str(DATA), "--port", "0") as teacher:
            _distil(_first_line(teacher)["url"])
        _serve(next(ticket for ticket in tickets if ticket.order_id != NO_ORDER))
    except DemoFailed as failure:
        print(f"\nThe demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again to go on from here.", file=sys.stderr)
        return 130
    return 0


def _make_data() -> list[Ticket]:
    train, test = write_splits(DATA)
    held_out = read_tickets(test)
    _say(f"{len(read_tickets(train))} generated tickets in {train}, {len(held_out)} in {test}.")
    return held_out


def _distil(teacher_url: str) -> None:
    _say(f"A stand-in teacher answers at {teacher_url}; no paid model is called.")
    if RUN.exists():
        _say(f"{RUN} is there from an earlier run: what it finished is not repeated.")
    command = ("distill.cli", "run", CONFIG, f"teacher.lm.api_base={teacher_url}/v1")
    with _process(*command, stdout=None) as run:
        if run.wait():
            raise DemoFailed(f"raydistill run ended with exit code {run.returncode}")
    _say(f"The teacher was called {_fetch(f'{teacher_url}/stats')['calls']} times.")


def _serve(ticket: Ticket) -> None:
    url = f"http://127.0.0.1:{(port := _free_port())}"
    _say(f"Serving the student: raydistill serve {RUN} --port {port}")
    with _process("distill.cli", "serve", str(RUN), "--port", str(port)) as server:
        _wait_until_serving(server)
        answer = _fetch(f"{url}/predict", {"ticket": ticket.ticket})
        _say("POST /predict with a held-out ticket:")
        print(textwrap.indent(textwrap.fill(ticket.ticket, 76), "    "), flush=True)
        for name, said in (("student", answer), ("truth", vars(ticket))):
            print(f"{name:>11}: {json.dumps({field: said.get(field) for field in FIELDS})}")
        code = _stop(server)
    if code:
        raise DemoFailed(f"raydistill serve ended with exit code {code} when interrupted")
    _say(f"Done. Everything is stopped; the report is {RUN / 'report.html'}.")


@contextmanager
def _process(
    module: str, *arguments: str, stdout: int | None = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=stdout,
        text=True,
        env=os.environ | _ENVIRONMENT,
        process_group=0,
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> int:
    """Interrupt a process that still runs and wait for its end; returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        process.kill()  # does nothing to a process that has ended
        process.wait()
        if process.stdout:
            process.stdout.close()
    return process.returncode


def _first_line(teacher: subprocess.Popen[str]) -> dict[str, str]:
    assert teacher.stdout is not None
    line = teacher.stdout.readline()
    if not line:
        raise DemoFailed("the stand-in teacher did not start")
    return json.loads(line)


def _wait_until_serving(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("Serving at"):
            return
    raise DemoFailed(f"raydistill serve ended with exit code {server.wait()}")


def _fetch(url: str, body: dict[str, str] | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _http.open(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")
        raise DemoFailed(f"{url} answered {error.code}: {detail}") from error
    except OSError as error:
        raise DemoFailed(f"{url} could not be called: {error}") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
