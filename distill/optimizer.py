"""``RayBootstrapFinetune``: DSPy's BootstrapFinetune on a Ray cluster.

    optimizer = RayBootstrapFinetune(metric=metric, student_model="scratch")
    finetuned = optimizer.compile(program, trainset=trainset)

``compile`` checks everything, traces the teachers over the trainset, renders rows, hands
them to each LM's provider and puts the students in place: the stages of ``pipeline``, behind
DSPy's own face. What there is to do is decided in ``compile_plan``.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from dspy.clients.utils_finetune import TrainDataFormat
from dspy.teleprompt import BootstrapFinetune

from distill import cluster, compile_record, summary
from distill.compile_checks import Settings
from distill.compile_plan import Key, Plan, Teacher, make_plan, trains_here
from distill.compile_record import CompileRecord
from distill.compile_rows import Traces, make_training_rows
from distill.progress import ProgressReporter
from distill.provider import reporting
from distill.rundir import RunDir
from distill.tracing.collect import collect
from distill.tracing.collection import Collection
from distill.tracing.conductor import CallSettings
from distill.tracing.limits import Limits
from distill.tracing.store import TraceStore
from serve import temporary


class RayBootstrapFinetune(BootstrapFinetune):
    """Fine-tunes a program's LMs on its own good runs, on Ray.

    Args:
        metric: ``(example, prediction, trace=None)`` to a bool or a number; an example
            whose score is not above zero teaches nothing. None keeps every finished example.
        multitask: One student for all predictors of an LM; False trains one per predictor.
        train_kwargs: Settings of training, the same for all LMs or by LM; see
            ``parse_train_kwargs``. Empty, an LM's own ``train_kwargs`` count.
        adapter: Renders the rows, the same for all LMs or by LM; None is DSPy's configured
            one.
        exclude_demos: Leave the demos out of the rows, and of the program.
        num_threads: Examples in flight; None is ``trace``'s actors times concurrency.
        student_model: What the students start from: ``scratch``, a Hugging Face directory
            or id. None: the predictors' own LMs are fine-tuned, each by its provider. Where
            all of these are of ``RayProvider`` already, they are in any case.
        prompt: ``folded`` or ``full``; see ``serve.folding``.
        scratch: Sizes of a micro-student.
        trace: How the teachers are run, as ``trace`` of a configuration file.
        storage: Local folder or fsspec URI for all that a compile leaves behind.
        name: The run's folder in it; None is the name of the program's class.
        setup: Called with the program once in each of Ray's processes that runs it, before its
            first example, to give it what cannot be sent there: clients, connections. It may
            be async. Where it can be imported, the served program is set up by it as well.
        strict_compat: Give training the very rows, in the order, that DSPy's own class
            would: full prompts, the teacher's instructions and demos, nothing held out.

    Raises:
        ConfigurationError: One of them is not what it should be.
    """

    def __init__(
        self,
        metric: Any = None,
        multitask: bool = True,
        train_kwargs: Mapping[Any, Any] | None = None,
        adapter: Any = None,
        exclude_demos: bool = False,
        num_threads: int | None = None,
        *,
        student_model: str | None = None,
        prompt: str = "folded",
        scratch: Mapping[str, Any] | None = None,
        trace: Mapping[str, Any] | None = None,
        storage: str = "runs",
        name: str | None = None,
        setup: Callable[[dspy.Module], Any] | None = None,
        strict_compat: bool = False,
    ) -> None:
        super().__init__(metric, multitask, train_kwargs, adapter, exclude_demos, num_threads)
        self.settings = Settings.read(
            student_model=student_model,
            prompt="full" if strict_compat else prompt,
            scratch=scratch,
            trace=trace,
            num_threads=num_threads,
            storage=storage,
            name=name,
            setup=setup,
            strict_compat=strict_compat,
        )

    def compile(
        self,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | list[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Fine-tune the student's LMs on what the teacher does well.

        Args:
            student: Changed and returned, as DSPy's own class does.
            trainset: Examples with their inputs set.
            teacher: Programs with the student's predictors; None is the student itself.
                Predictors without an LM of their own ask ``dspy.settings.lm``.
            valset: Traced as well; the epoch that does best on it is chosen. None holds a
                twentieth of the trainset back for it.

        Raises:
            ConfigurationError: It cannot end well; nothing has been paid for.
            TracingError: Nothing that the teachers did can be learned from.
            BudgetExceeded: Tracing stopped at its budget; compile again goes on from there.
            TrainingError: Training failed.
        """
        plan = make_plan(self, student, trainset, teacher, valset)
        directory = RunDir(f"{self.settings.storage}/{plan.name}")
        directory.create()
        with cluster.connected():
            temporary.sweep()
            plan = plan.fitted()
            with directory.locked(), reporting(directory) as progress:
                jobs = self._make_jobs(plan, self._trace(plan, directory, progress), progress)
            _free(student)
            students = self.finetune_lms(jobs)
        for predictor, key in zip(student.predictors(), plan.keys, strict=True):
            predictor.lm = students[key]
            predictor.demos = [] if self.exclude_demos else predictor.demos
        student._compiled = True
        return student

    @staticmethod
    def finetune_lms(finetune_dict: Mapping[Key, Mapping[str, Any]]) -> dict[Key, Any]:
        """Run the fine-tuning jobs; the first that fails ends the others.

        Args:
            finetune_dict: By key, an ``lm`` and what its ``finetune`` takes.

        Returns:
            The fine-tuned LMs, by key.

        Raises:
            Exception: What a job failed with.
        """
        jobs: dict[Key, Any] = {}
        try:
            for key, arguments in finetune_dict.items():
                rest = dict(arguments)
                lm = rest.pop("lm")
                # It may hold what its own training needs.
                lm.kill()
                jobs[key] = lm.finetune(**rest)
            return {key: _result(job) for key, job in jobs.items()}
        except BaseException:
            for job in jobs.values():
                job.cancel()
            # They must not outlive the Ray that they run on.
            for job in jobs.values():
                if job.thread:
                    job.thread.join()
            raise

    def _trace(self, plan: Plan, directory: RunDir, progress: ProgressReporter) -> list[Traces]:
        """What each teacher did."""
        store = TraceStore(directory.join("traces"))
        jobs = [_collection(plan, teacher, store) for teacher in plan.teachers]
        keys = list(itertools.chain.from_iterable(job.keys() for job in jobs))
        record = CompileRecord(trace=plan.trace, has_metric=plan.has_metric, keys=keys)
        compile_record.write(directory, record)
        found: list[Traces] = []
        spent_usd = 0.0
        for job in jobs:
            job = dataclasses.replace(job, limits=Limits.of(plan.trace, spent_usd))
            spending = job.spending()
            with progress.stage("trace") as stage:
                collect(job, summary.show_tracing(stage))
                by_example = itertools.groupby(
                    job.traces(spending), key=lambda trace: trace.example_id
                )
                found.append({name: list(runs) for name, runs in by_example})
            spent_usd += spending.cost_usd
        return found

    def _make_jobs(
        self, plan: Plan, found: Sequence[Traces], progress: ProgressReporter
    ) -> dict[Key, dict[str, Any]]:
        """What each group's LM is fine-tuned with."""
        jobs = {}
        for group in plan.groups:
            with progress.stage("rows") as stage:
                rows, text = make_training_rows(plan, group, found)
                stage.update(1, 1, text)
                jobs[group.key] = {
                    "lm": group.lm,
                    "train_data": rows,
                    "train_data_format": TrainDataFormat.CHAT,
                    "train_kwargs": dict(group.train_kwargs),
                }
        return jobs


def _collection(plan: Plan, teacher: Teacher, store: TraceStore) -> Collection:
    trace = plan.trace
    return Collection(
        task=teacher.task,
        lm=teacher.lm,
        examples=[*plan.trainset, *plan.valset],
        store=store,
        actors=trace.min_actors,
        max_actors=trace.max_actors,
        concurrency=trace.concurrency,
        limits=Limits.of(trace),
        calls=CallSettings.of(trace),
        run=plan.name,
        samples=trace.samples,
        hints=trace.hints,
        threshold=None if trace.keep == "all" else trace.metric_threshold,
    )


def _free(student: dspy.Module) -> None:
    """Take down what was launched for the LMs that are to be replaced."""
    for predictor in student.predictors():
        if trains_here(predictor.lm):
            predictor.lm.kill()


def _result(job: Any) -> Any:
    """A finished job's LM."""
    result = job.result()
    # Providers of DSPy's own hand their errors out as results.
    if isinstance(result, Exception):
        raise result
    return result
