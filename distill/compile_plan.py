"""What a compile will do, decided and checked before the first teacher call.

``make_plan`` refuses what cannot end well. Carrying the plan out is ``optimizer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import dspy
from dspy.clients.lm_local import LocalProvider

from distill import preflight, unpicklable
from distill.compile_checks import (
    MAX_FAILURE_RATE,
    Settings,
    check_examples,
    check_imports,
    check_metric,
    check_program,
    find_teacher_lm,
    structural,
)
from distill.config import SCRATCH, TraceConfig
from distill.datasets import distinct
from distill.programs import Task, carried_settings
from distill.provider import RayProvider
from distill.rows import Prompts, check_renderable, predictor_prompts
from distill.tracing.actor import LmSpec
from distill.tracing.limits import MIN_SAMPLE
from distill.train_kwargs import parse_train_kwargs
from serve.dspy_lm import lm_identity, model_name
from serve.errors import ConfigurationError
from serve.folding import Folding

Key = tuple[Any, int | None]


class Optimizer(Protocol):
    """What is read off a ``RayBootstrapFinetune``; by LM where DSPy has it so."""

    metric: Any
    multitask: bool
    train_kwargs: Mapping[Any, Any]
    adapter: Mapping[Any, Any]
    exclude_demos: bool
    settings: Settings
    finetune_lms: Any


@dataclass(frozen=True)
class Teacher:
    """A program to trace, and the LM of its predictors that have none."""

    task: Task
    lm: LmSpec


@dataclass(frozen=True)
class Group:
    """One fine-tuning: an LM, and the predictors that it learns to be.

    Attributes:
        key: DSPy's name for it: the LM, and the predictor's index if it learns but one.
        lm: What is fine-tuned.
        prompts: The predictors, as they will ask the student.
        adapter: Renders the rows.
        folding: None for full prompts.
        train_kwargs: As the user gave them.
    """

    key: Key
    lm: Any
    prompts: Prompts
    adapter: dspy.Adapter
    folding: Folding | None
    train_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A compile, checked.

    Attributes:
        name: The run's.
        student: What is compiled.
        teachers: Traced one after the other.
        groups: Trained one after the other.
        keys: The group of each predictor of the student, in the program's order.
        trainset, valset: Examples to trace.
        num_threads: How many of them are in flight; None is as ``trace`` says.
    """

    name: str
    teachers: Sequence[Teacher]
    groups: Sequence[Group]
    keys: Sequence[Key]
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    trace: TraceConfig
    num_threads: int | None
    student: Task
    exclude_demos: bool
    strict_compat: bool

    @property
    def has_metric(self) -> bool:
        """Whether a metric chooses among the traces."""
        return self.student.metric is not None

    def fitted(self) -> "Plan":
        """The same, for the connected cluster.

        Raises:
            ConfigurationError: More workers or actors are asked for than fit.
        """
        trace = preflight.fitted_actors(self.trace, in_flight=self.num_threads)
        preflight.check_actors(trace)
        for group in self.groups:
            if trains_here(group.lm):
                train = parse_train_kwargs(group.train_kwargs, SCRATCH).train
                preflight.check_workers(preflight.fitted_workers(train))
        return replace(self, trace=trace)


def make_plan(
    optimizer: Optimizer,
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    teacher: dspy.Module | Sequence[dspy.Module] | None,
    valset: Sequence[dspy.Example] | None,
) -> Plan:
    """Decide what a compile does.

    Raises:
        ConfigurationError: It cannot end well.
    """
    settings = optimizer.settings
    check_program(student)
    check_metric(optimizer.metric)
    groups, keys = _make_groups(optimizer, student)
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    if not teachers:
        raise ConfigurationError(
            "teacher is an empty list: there is nothing to learn from. Leave it out, and the "
            "student is its own teacher."
        )
    programs = [structural(student, program) for program in teachers]
    if not trainset:
        raise ConfigurationError("trainset is empty: there is nothing to learn from.")
    check_examples("trainset", trainset, programs)
    check_examples("valset", valset or (), programs)
    trace = settings.trace
    check_imports(trace.imports, student, optimizer.multitask)
    if len(distinct(trainset)) < MIN_SAMPLE and trace.max_failure_rate == MAX_FAILURE_RATE:
        trace = trace.model_copy(update={"max_failure_rate": 1.0})
    return Plan(
        name=settings.name or type(student).__name__,
        teachers=[_make_teacher(program, optimizer) for program in programs],
        groups=groups,
        keys=keys,
        trainset=trainset,
        valset=valset or (),
        trace=trace,
        num_threads=settings.num_threads,
        student=_make_task(student, optimizer),
        exclude_demos=optimizer.exclude_demos,
        strict_compat=settings.strict_compat,
    )


def _make_teacher(program: dspy.Module, optimizer: Optimizer) -> Teacher:
    lm = find_teacher_lm(program)
    task = _make_task(program, optimizer)
    task.dumps()
    fresh = lm.copy()
    culprit = unpicklable.find(fresh, "lm")
    if culprit:
        raise ConfigurationError(
            f"The teacher's LM ({type(lm).__name__}) cannot be sent to Ray's workers: {culprit}. "
            "Let the LM make it when it is first called."
        )
    return Teacher(task, LmSpec(make=fresh.copy, identity={"teacher": lm_identity(lm)}))


def _make_task(program: dspy.Module, optimizer: Optimizer) -> Task:
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    setup = optimizer.settings.setup
    return Task(program, adapter, optimizer.metric, carried_settings(), setup)


def _make_groups(optimizer: Optimizer, student: dspy.Module) -> tuple[list[Group], list[Key]]:
    """The fine-tunings, and which of them each predictor belongs to."""
    settings = optimizer.settings
    name = settings.name or type(student).__name__
    # Students of ours that a program has already go on from where they are.
    own = all(trains_here(predictor.lm) for predictor in student.predictors())
    shared = None
    if settings.student_model and not own:
        shared = _student_lm(settings, settings.student_model, name)
    prompts = predictor_prompts(student, optimizer.exclude_demos)
    members: dict[Key, dict[str, Any]] = {}
    keys: list[Key] = []
    for index, (name, predictor) in enumerate(student.named_predictors()):
        if shared is None and predictor.lm is None:
            raise ConfigurationError(
                f"Predictor {index} ({name}) does not have an LM assigned. Give the optimizer a "
                'student_model, such as "scratch" or a Hugging Face model, or give the predictors '
                "LMs that can be fine-tuned with your_module.set_lm(your_lm)."
            )
        key = (shared or predictor.lm, None if optimizer.multitask else index)
        keys.append(key)
        members.setdefault(key, {})[name] = predictor.lm
    # As in DSPy: an LM that learns several tasks learns those of the other LMs as well.
    learned = {
        key: prompts if optimizer.multitask else {name: prompts[name] for name in lms}
        for key, lms in members.items()
    }
    groups = [_make_group(optimizer, key, lms, learned[key]) for key, lms in members.items()]
    return groups, keys


def trains_here(lm: Any) -> bool:
    """Whether it is raydistill that would fine-tune the LM."""
    return isinstance(getattr(lm, "provider", None), RayProvider)


def _student_lm(settings: Settings, model: str, name: str) -> dspy.LM:
    sizes = settings.scratch.model_dump()
    provider = RayProvider(storage=settings.storage, name=name, scratch=sizes)
    return dspy.LM(model_name(model), provider=provider)


def _make_group(optimizer: Optimizer, key: Key, lms: Mapping[str, Any], prompts: Prompts) -> Group:
    lm, settings = key[0], optimizer.settings
    # By the predictor's own LM as well: a user cannot name the one that is made here.
    candidates = (lm, *lms.values())
    adapter = _choose(optimizer.adapter, candidates, "adapter")
    adapter = adapter or dspy.settings.adapter or dspy.ChatAdapter()
    check_renderable(prompts, adapter)
    kwargs = _choose(optimizer.train_kwargs, candidates, "train_kwargs")
    group = Group(
        key=key,
        lm=lm,
        prompts=prompts,
        adapter=adapter,
        folding=Folding.learn(prompts, adapter) if settings.prompt == "folded" else None,
        train_kwargs=kwargs or getattr(lm, "train_kwargs", None) or {},
    )
    _check_finetunable(optimizer, group, next(iter(lms)))
    return group


def _check_finetunable(optimizer: Optimizer, group: Group, predictor: str) -> None:
    # Whoever puts another method in the place of finetune_lms knows what that one can train.
    if optimizer.finetune_lms.__module__ != "distill.optimizer":
        return
    provider: Any = getattr(group.lm, "provider", None)
    if not getattr(provider, "finetunable", False):
        raise ConfigurationError(
            f"The LM of {predictor}, {group.lm.model}, cannot be fine-tuned: "
            f"{type(provider).__name__ if provider else type(group.lm).__name__} does not offer "
            'it. Give the optimizer a student_model, such as "scratch", or the predictors an LM '
            "whose provider does."
        )
    if isinstance(provider, LocalProvider):
        raise ConfigurationError(
            f"The LM of {predictor}, {group.lm.model}, has DSPy's LocalProvider, which does not "
            "run with current releases of its libraries. Give the LM provider=RayProvider(), or "
            "the optimizer a student_model."
        )
    if trains_here(group.lm):
        full = group.folding is None or group.folding.unfoldable
        blank = check_renderable(group.prompts, group.adapter) if full else ()
        provider.check(group.lm.finetuning_model or group.lm.model, group.train_kwargs, blank)


def _choose(by_lm: Mapping[Any, Any], lms: Sequence[Any], name: str) -> Any:
    """What was given for the first of these LMs that something was given for."""
    for lm in lms:
        # Not get(): DSPy makes it a defaultdict where one value is for all.
        try:
            return by_lm[lm]
        except KeyError:
            continue
    raise ConfigurationError(
        f"{name}: is given by LM, but not for {', '.join(str(lm.model) for lm in lms if lm)}."
    )
