"""What a compile will do, decided and checked before the first teacher call.

``make_plan`` refuses what cannot end well. Carrying the plan out is ``optimizer``.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import dspy
from dspy.teleprompt.bootstrap_finetune import prepare_teacher

from distill import imports, preflight
from distill.config import SCRATCH, ScratchConfig, TraceConfig
from distill.datasets import distinct
from distill.programs import Task, carried_settings, check_inputs
from distill.provider import RayProvider, validated
from distill.rows import Prompts, check_renderable, predictor_prompts
from distill.tracing.actor import LmSpec
from distill.tracing.limits import MIN_SAMPLE
from distill.train_kwargs import parse_train_kwargs
from serve.dspy_lm import lm_identity, model_name
from serve.errors import ConfigurationError
from serve.folding import Folding

if TYPE_CHECKING:
    from distill.optimizer import RayBootstrapFinetune

MAX_FAILURE_RATE = 0.5
"""Of at least ``MIN_SAMPLE`` examples; what fails most of the time is not worth its price."""

Key = tuple[Any, int | None]


@dataclass(frozen=True)
class Settings:
    """What ``RayBootstrapFinetune`` takes besides what DSPy's own class does."""

    student_model: str | None
    prompt: str
    scratch: ScratchConfig
    trace: TraceConfig
    storage: str
    name: str | None
    strict_compat: bool

    @classmethod
    def read(
        cls,
        *,
        scratch: Mapping[str, Any] | None,
        trace: Mapping[str, Any] | None,
        num_threads: int | None,
        **plain: Any,
    ) -> "Settings":
        """Check them.

        Raises:
            ConfigurationError: One is not what it should be.
        """
        if plain["prompt"] not in ("folded", "full"):
            raise ConfigurationError(f"prompt={plain['prompt']!r}: expected 'folded' or 'full'.")
        tracing: TraceConfig = validated(
            TraceConfig, {"max_failure_rate": MAX_FAILURE_RATE, **(trace or {})}, "trace"
        )
        if num_threads:
            actors = min(tracing.max_actors, num_threads)
            spread = {"actors": actors, "concurrency": -(-num_threads // actors)}
            tracing = tracing.model_copy(update=spread)
        sizes = validated(ScratchConfig, scratch or {}, "scratch")
        return cls(scratch=sizes, trace=tracing, **plain)


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
    """

    name: str
    teachers: Sequence[Teacher]
    groups: Sequence[Group]
    keys: Sequence[Key]
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    trace: TraceConfig
    student: Task
    exclude_demos: bool
    strict_compat: bool

    @property
    def has_metric(self) -> bool:
        """Whether a metric chooses among the traces."""
        return self.student.metric is not None

    def check_cluster(self) -> None:
        """Check that the connected cluster can hold the compile.

        Raises:
            ConfigurationError: More workers or actors are asked for than fit.
        """
        preflight.check_actors(self.trace)
        for group in self.groups:
            if isinstance(getattr(group.lm, "provider", None), RayProvider):
                preflight.check_workers(parse_train_kwargs(group.train_kwargs, SCRATCH).train)


def make_plan(
    optimizer: "RayBootstrapFinetune",
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
    _check_program(student)
    _check_metric(optimizer.metric)
    groups, keys = _make_groups(optimizer, student)
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    programs = [_structural(student, program) for program in teachers]
    _check_examples("trainset", trainset, programs)
    _check_examples("valset", valset or (), programs)
    if not trainset:
        raise ConfigurationError("trainset is empty: there is nothing to learn from.")
    trace = settings.trace
    _check_imports(optimizer, student)
    if len(distinct(trainset)) < MIN_SAMPLE and trace.max_failure_rate == MAX_FAILURE_RATE:
        trace = trace.model_copy(update={"max_failure_rate": 1.0})
    return Plan(
        name=settings.name or type(student).__name__,
        teachers=[_make_teacher(program, optimizer.metric) for program in programs],
        groups=groups,
        keys=keys,
        trainset=trainset,
        valset=valset or (),
        trace=trace,
        student=_make_task(student, optimizer.metric),
        exclude_demos=optimizer.exclude_demos,
        strict_compat=settings.strict_compat,
    )


def _check_imports(optimizer: "RayBootstrapFinetune", student: dspy.Module) -> None:
    files = optimizer.settings.trace.imports
    imports.check(files)
    if files and not optimizer.multitask and len(student.predictors()) > 1:
        raise ConfigurationError(
            "trace.import: a chat log does not say which predictor it is of, and multitask=False "
            "trains each on its own. Leave one of the two away."
        )


def _check_program(student: Any) -> None:
    if not isinstance(student, dspy.Module):
        raise ConfigurationError(
            f"student is a {type(student).__name__}; expected a dspy.Module, that is an instance "
            "and not the class."
        )
    if not student.predictors():
        raise ConfigurationError(f"{type(student).__name__} has no predictors to fine-tune.")


def _check_metric(metric: Any) -> None:
    if metric is None:
        return
    try:
        inspect.signature(metric).bind(None, None, None)
    except TypeError as error:
        raise ConfigurationError(
            f"metric: expected a function (example, prediction, trace=None): {error}."
        ) from None
    except ValueError:
        return  # A builtin does not say what it takes.


def _check_examples(name: str, examples: Any, programs: Sequence[dspy.Module]) -> None:
    checked: set[tuple[str, ...]] = set()
    for number, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise ConfigurationError(
                f"{name}[{number}] is a {type(example).__name__}; expected a dspy.Example."
            )
        try:
            inputs = tuple(example.inputs().keys())
        except ValueError:
            raise ConfigurationError(
                f"{name}[{number}] does not say which of its fields are inputs. Call "
                ".with_inputs(...) on it."
            ) from None
        if inputs not in checked:
            checked.add(inputs)
            for program in programs:
                check_inputs(program, inputs, f"{name}[{number}].inputs()")


def _structural(student: dspy.Module, teacher: dspy.Module | None) -> dspy.Module:
    """The teacher; the student where there is none."""
    try:
        return prepare_teacher(student, teacher)
    except AssertionError as error:
        raise ConfigurationError(f"teacher: does not fit the student: {error}.") from None


def _make_teacher(program: dspy.Module, metric: Any) -> Teacher:
    without = [name for name, predictor in program.named_predictors() if predictor.lm is None]
    lm = dspy.settings.lm or (None if without else program.predictors()[0].lm)
    if lm is None:
        raise ConfigurationError(
            f"The teacher's predictors {', '.join(without)} have no LM to ask. Configure one with "
            "dspy.configure(lm=...), or give the teacher its own with teacher.set_lm(lm)."
        )
    task = _make_task(program, metric)
    task.dumps()
    fresh = lm.copy()
    try:
        cloudpickle.dumps(fresh)
    # Which error it is depends on what the LM holds.
    except Exception as error:
        raise ConfigurationError(
            f"The teacher's LM ({type(lm).__name__}) cannot be sent to Ray's workers: {error}."
        ) from error
    return Teacher(task, LmSpec(make=fresh.copy, identity={"teacher": lm_identity(lm)}))


def _make_task(program: dspy.Module, metric: Any) -> Task:
    return Task(program, dspy.settings.adapter or dspy.ChatAdapter(), metric, carried_settings())


def _make_groups(
    optimizer: "RayBootstrapFinetune", student: dspy.Module
) -> tuple[list[Group], list[Key]]:
    """The fine-tunings, and which of them each predictor belongs to."""
    settings = optimizer.settings
    name = settings.name or type(student).__name__
    shared = _student_lm(settings, settings.student_model, name) if settings.student_model else None
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


def _student_lm(settings: Settings, model: str, name: str) -> dspy.LM:
    sizes = settings.scratch.model_dump()
    provider = RayProvider(storage=settings.storage, name=name, scratch=sizes)
    return dspy.LM(model_name(model), provider=provider)


def _make_group(
    optimizer: "RayBootstrapFinetune", key: Key, lms: Mapping[str, Any], prompts: Prompts
) -> Group:
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


def _check_finetunable(optimizer: "RayBootstrapFinetune", group: Group, predictor: str) -> None:
    # Whoever puts another method in the place of finetune_lms knows what that one can train.
    if optimizer.finetune_lms is not type(optimizer).finetune_lms:
        return
    provider = getattr(group.lm, "provider", None)
    if not getattr(provider, "finetunable", False):
        raise ConfigurationError(
            f"The LM of {predictor}, {group.lm.model}, cannot be fine-tuned: "
            f"{type(provider).__name__ if provider else type(group.lm).__name__} does not offer "
            'it. Give the optimizer a student_model, such as "scratch", or the predictors an LM '
            "whose provider does."
        )
    if isinstance(provider, RayProvider):
        full = group.folding is None or group.folding.unfoldable
        blank = check_renderable(group.prompts, group.adapter) if full else ()
        provider.check(group.lm.model, group.train_kwargs, blank)


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
