"""The command line: parses, hands over, and turns errors into messages and exit codes.

Heavy imports wait until a command needs them, so that ``--help`` answers at once. What Ray
and DeepSpeed print goes to a file in the run directory, unless asked for.
"""

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.terminal import Terminal
from serve.errors import ConfigurationError, DistillError

if TYPE_CHECKING:
    from distill.config import RunConfig
    from distill.progress import ProgressReporter
    from distill.rundir import RunDir

logger = logging.getLogger(__name__)

INTERRUPTED = 130
Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    with Terminal(verbose=arguments.verbose) as terminal:
        try:
            arguments.command(arguments, terminal)
        except DistillError as error:
            logger.debug("the error in full", exc_info=True)
            terminal.say(f"raydistill: {error}")
            return error.exit_code
        except KeyboardInterrupt:
            terminal.say("raydistill: interrupted. The same command goes on from here.")
            return INTERRUPTED
        except Exception as error:
            logger.exception("raydistill failed")
            terminal.say(f"raydistill: {type(error).__name__}: {error}")
            if terminal.log:
                terminal.say(f"The traceback is in {terminal.log}; --verbose shows it here.")
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydistill",
        description="Distill a DSPy program into a small student, and serve it, on Ray.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function, name=name)
        sub.add_argument("--verbose", action="store_true", help="show what Ray and DeepSpeed say")
        return sub

    for name, function, text in (
        ("run", _run, "trace, train, evaluate and report; goes on where it stopped"),
        ("trace", _trace, "run the teacher over the trainset, and keep every trace"),
        ("train", _train, "train the student on the traces that are there"),
        ("evaluate", _evaluate, "compare the trained student with its teacher"),
        ("check", _check, "check everything, and estimate the calls; calls no teacher"),
    ):
        sub = command(name, function, text)
        sub.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        sub.add_argument(
            "overrides", nargs="*", metavar="key.path=value", help="as train.num_workers=1"
        )
    report = command("report", _report, "print a run's report, and rebuild report.html")
    report.add_argument("run_dir", metavar="RUN_DIR")
    traces = command("traces", _traces, "list a run's traces, or write them to a file")
    traces.add_argument("run_dir", metavar="RUN_DIR")
    which = traces.add_mutually_exclusive_group()
    which.add_argument("--kept", action="store_true", help="only those that rows are made of")
    which.add_argument(
        "--rejected",
        nargs="?",
        const="",
        metavar="REASON",
        help="only the others; REASON is metric, parse, error, surplus or an error's type",
    )
    traces.add_argument("--predictor", metavar="NAME", help="only the calls of this one")
    traces.add_argument("--limit", type=int, metavar="N", help="so many; 20 unless exported")
    traces.add_argument("--export", metavar="FILE.jsonl", help="write them to a file")
    serve = command("serve", _serve, "serve a run's student, or any student, until interrupted")
    serve.add_argument("run_dir", metavar="DIR", help="a run directory or a student directory")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    return parser


def _run(arguments: Arguments, terminal: Terminal) -> None:
    with _prepared(arguments, terminal) as (config, progress, directory):
        from distill import pipeline

        _show(pipeline.run(config, progress), directory, terminal)


def _trace(arguments: Arguments, terminal: Terminal) -> None:
    with _prepared(arguments, terminal) as (config, progress, _):
        from distill import pipeline

        with pipeline.opened(config, progress) as run:
            pipeline.trace(run)


def _train(arguments: Arguments, terminal: Terminal) -> None:
    with _prepared(arguments, terminal) as (config, progress, _):
        from distill import pipeline

        with pipeline.opened(config, progress) as run:
            pipeline.train(run, pipeline.make_rows(run))


def _evaluate(arguments: Arguments, terminal: Terminal) -> None:
    with _prepared(arguments, terminal) as (config, progress, directory):
        from distill import pipeline

        with pipeline.opened(config, progress) as run:
            report = pipeline.evaluate(run, pipeline.make_rows(run))
        _show(report, directory, terminal)


def _check(arguments: Arguments, terminal: Terminal) -> None:
    from distill.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    terminal.silence()
    from distill import cluster, estimate, preflight

    inputs = preflight.load(config)
    with cluster.connected():
        train = preflight.fitted_workers(config.train)
        trace = preflight.fitted_actors(config.trace, config.teacher)
        preflight.check_cluster(train, trace, config.teacher)
    config = config.model_copy(update={"trace": trace})
    expected = estimate.estimate(inputs, config)
    terminal.say("All is well. " + estimate.describe(expected, config))


def _report(arguments: Arguments, terminal: Terminal) -> None:
    from distill.evaluation.report import render_html
    from distill.rundir import RunDir

    directory = RunDir(arguments.run_dir)
    report = directory.read_json("report.json")
    if report is None:
        raise ConfigurationError(
            f"{arguments.run_dir}: has no report.json. Finish the run with raydistill run."
        )
    directory.write_text("report.html", render_html(report))
    _show(report, directory, terminal)


def _traces(arguments: Arguments, terminal: Terminal) -> None:
    import itertools

    from distill import listing
    from distill.progress import ProgressReporter
    from distill.rundir import RunDir

    terminal.silence()
    chosen = listing.Filter(arguments.kept, arguments.rejected, arguments.predictor)
    progress = ProgressReporter(terminal.console)
    found = chosen.apply(listing.judged_traces(RunDir(arguments.run_dir), progress))
    if arguments.export:
        count = listing.export(itertools.islice(found, arguments.limit), arguments.export)
        terminal.say(f"{count} traces: {arguments.export}")
        return
    limit = 20 if arguments.limit is None else arguments.limit
    terminal.console.print(listing.render(found, limit))


def _serve(arguments: Arguments, terminal: Terminal) -> None:
    from distill.export import app_args
    from distill.rundir import RunDir
    from serve.app import run
    from serve.student import Manifest

    _on_end_signals(_interrupt)
    directory = RunDir(arguments.run_dir)
    args = app_args(directory)
    in_run = args.student != directory.uri
    # A student's own folder is a plain model, and no place for logs.
    terminal.log_to(_log_file(directory, "serve") if in_run else None)
    terminal.say(f"Starting the student in {args.student} ...")
    server = run(args, host=arguments.host, port=arguments.port)
    route = "/predict" if Manifest.load(args.student).program else "/v1/chat/completions"
    try:
        terminal.say(f"Serving at {server.url}: POST {route}, see /docs. Ctrl-C stops it.")
        threading.Event().wait()
    except KeyboardInterrupt:
        terminal.say("Stopping ...")
    finally:
        # It is stopping already: another Ctrl-C must not leave half of it behind.
        _on_end_signals(signal.SIG_IGN)
        server.close()


def _on_end_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _prepared(
    arguments: Arguments, terminal: Terminal
) -> Iterator[tuple["RunConfig", "ProgressReporter", "RunDir"]]:
    """The configuration, a reporter that records events, and the run directory."""
    from distill.config_file import load_config
    from distill.progress import ProgressReporter, open_events
    from distill.rundir import RunDir

    config = load_config(arguments.config, arguments.overrides)
    directory = RunDir(f"{config.storage}/{config.name}")
    directory.create()
    terminal.log_to(_log_file(directory, arguments.name))
    with (
        directory.guarded(),
        directory.locked(),
        directory.appending("events.jsonl") as path,
        open_events(path) as events,
    ):
        yield config, ProgressReporter(terminal.console, events), directory


def _log_file(directory: "RunDir", command: str) -> Path | None:
    """A new log in the run directory; None where that is not on this machine."""
    if not directory.is_local:
        return None
    return Path(directory.join("logs")) / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"


def _show(report: dict[str, Any], directory: "RunDir", terminal: Terminal) -> None:
    from distill.evaluation.report import render_terminal

    terminal.console.print()
    terminal.console.print(render_terminal(report))
    terminal.say(f"Report: {directory.join('report.html')}")


if __name__ == "__main__":
    sys.exit(main())
