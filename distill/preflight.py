"""Whatever can be known before the first paid call, checked before it.

``load`` reads and imports, and needs no Ray; ``check_cluster`` compares what the run asks
for with what the cluster has. Both end in a ``ConfigurationError`` or in nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from distill import datasets, imports, open_teacher, programs, rows
from distill.config import (
    SCRATCH,
    ActorsConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TraceConfig,
    TrainConfig,
)
from distill.evaluation.evaluate import teacher_lm
from distill.fingerprints import model_files
from distill.programs import Task
from distill.training import tracking
from distill.training.deepspeed_config import check_precision, make_deepspeed_config
from serve.cluster import capacity
from serve.errors import ConfigurationError
from serve.folding import Folding


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, loaded and checked."""

    task: Task
    train: Sequence[dspy.Example]
    dev: Sequence[dspy.Example]
    test: Sequence[dspy.Example]
    folding: Folding | None


def load(config: RunConfig) -> Inputs:
    """Load and check data, program, metric, teacher settings and student model.

    Raises:
        ConfigurationError: One of them cannot work.
    """
    _check_teacher(config.teacher.lm)
    task, train, dev = load_traced(config)
    task.dumps()
    imports.check(config.trace.imports)
    test = datasets.load_examples(config.data.test, config.data)
    programs.check_inputs(task.program, config.data.inputs)
    open_teacher.check_none_inside(task.program)
    prompts = rows.predictor_prompts(task.program)
    rendered = rows.check_renderable(prompts, task.adapter)
    if open_teacher.is_open(config.teacher.lm):
        open_teacher.check(config.teacher.lm, rendered)
    folding = None
    if config.student.prompt == "folded":
        folding = Folding.learn(prompts, task.adapter)
    check_training(config.student, config.train, rendered if _any_full(folding) else ())
    _check_choice(config, dev)
    return Inputs(task, train, dev, test, folding)


def load_traced(
    config: RunConfig,
) -> tuple[Task, Sequence[dspy.Example], Sequence[dspy.Example]]:
    """The program, and the examples that it is traced on: those to train and to validate on.

    Raises:
        ConfigurationError: One of them cannot be loaded.
    """
    task = programs.load_task(config.program, config.metric, config.setup)
    return task, *_training_data(config)


def check_training(
    student: StudentConfig, train: TrainConfig, prompts: Sequence[rows.Messages] = ()
) -> None:
    """See that this student can be trained by this recipe.

    Args:
        student: What is trained.
        train: The recipe.
        prompts: Full prompts that the model's chat template has to render.

    Raises:
        ConfigurationError: It cannot.
    """
    tracking.check(train.report_to)
    make_deepspeed_config(train, num_workers=train.num_workers, use_gpu=False, bf16_supported=True)
    if student.model != SCRATCH:
        # Imported here: they bring torch, which a scratch student's check does not need.
        from distill.training import lora
        from distill.training.base_model import check_base_model

        if student.lora is not None:
            lora.check_installed()
        check_base_model(student.model, prompts)


def fitted_workers(train: TrainConfig) -> TrainConfig:
    """The same, with no more workers than the cluster holds unless their number was given."""
    if "num_workers" in train.model_fields_set:
        return train
    room = int(capacity("GPU" if use_gpu(train) else "CPU"))
    return train.model_copy(update={"num_workers": max(1, min(train.num_workers, room))})


def fitted_actors(
    trace: TraceConfig, teacher: TeacherConfig | None = None, in_flight: int | None = None
) -> TraceConfig:
    """The same, with no more actors than the cluster holds unless their number was given.

    Args:
        trace: How the teacher is run.
        teacher: Takes its part of the cluster, if it is one that the run serves.
        in_flight: Examples in flight in all; None is ``concurrency`` for each actor.
    """
    taken = open_teacher.num_cpus(teacher) if teacher else 0
    fitting = max(1, int(capacity("CPU")) - taken)
    if "actors" not in trace.model_fields_set:
        trace = trace.model_copy(update={"actors": min(trace.max_actors, fitting)})
    if in_flight is None:
        return trace
    most = min(trace.max_actors, max(trace.min_actors, fitting), in_flight)
    actors = ActorsConfig(min=min(trace.min_actors, most), max=most)
    return trace.model_copy(update={"actors": actors, "concurrency": in_flight // most})


def check_cluster(train: TrainConfig, trace: TraceConfig, teacher: TeacherConfig) -> None:
    """Check that the connected cluster can hold the run.

    Raises:
        ConfigurationError: More workers, actors or replicas are asked for than fit.
    """
    check_workers(train)
    check_actors(trace)
    _check_beside(trace, teacher)


def check_actors(trace: TraceConfig) -> None:
    """Check that the connected cluster can hold the tracing actors.

    Raises:
        ConfigurationError: It cannot.
    """
    _check_fits("trace.actors", trace.min_actors, "CPU")


def check_workers(train: TrainConfig) -> None:
    """Check that the connected cluster can hold the training workers.

    Raises:
        ConfigurationError: It cannot, or its processors do not compute as configured.
    """
    check_precision(train, use_gpu(train))
    _check_fits("train.num_workers", train.num_workers, "GPU" if use_gpu(train) else "CPU")


def use_gpu(train: TrainConfig) -> bool:
    """Whether training uses GPUs: as configured, or if the cluster has any."""
    if train.use_gpu == "auto":
        return capacity("GPU") > 0
    return train.use_gpu


def _training_data(config: RunConfig) -> tuple[list[dspy.Example], list[dspy.Example]]:
    train = datasets.load_examples(config.data.train, config.data)
    if config.data.dev:
        return train, datasets.load_examples(config.data.dev, config.data)
    split: dict[bool, list[dspy.Example]] = {True: [], False: []}
    for example in train:
        split[datasets.is_dev(datasets.example_id(example))].append(example)
    if not split[False]:
        raise ConfigurationError(
            f"{config.data.train}: its {len(train)} examples all fall into the validation split. "
            "Give more examples, or data.dev."
        )
    return split[False], split[True]


def base_fingerprint(model: str) -> Any:
    """What names a base model: its id, or for a folder on this machine its files as well."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return [model, *model_files(folder)]


def _check_choice(config: RunConfig, dev: Sequence[dspy.Example]) -> None:
    """See that what the student is to be chosen by is there."""
    if config.train.select_by != "metric":
        return
    lacking = "no metric is given" if config.metric is None else ""
    if not dev:
        lacking = f"{config.data.dev or config.data.train}: gives no dev examples to score it on"
    if lacking:
        raise ConfigurationError(
            f"train.select_by=metric chooses by the program's metric on the dev set; {lacking}. "
            "Give metric and data.dev, or use train.select_by=exact or loss."
        )


def _any_full(folding: Folding | None) -> bool:
    return folding is None or bool(folding.unfoldable)


def _check_teacher(settings: dict[str, Any]) -> None:
    try:
        teacher_lm(settings).make()
    except ConfigurationError:
        raise  # It says itself what is wrong.
    except Exception as error:
        raise ConfigurationError(
            f"teacher.lm={settings} is not what dspy.LM takes: {error}"
        ) from error


def _check_beside(trace: TraceConfig, teacher: TeacherConfig) -> None:
    """Check that the teacher's replicas and the actors that ask them fit together."""
    replicas, taken = teacher.num_replicas, open_teacher.num_cpus(teacher)
    if not taken:
        return
    needed, found = taken + trace.min_actors, int(capacity("CPU"))
    if needed > found:
        raise ConfigurationError(
            f"teacher.num_replicas={replicas} and trace.actors={trace.min_actors} need {needed} "
            f"CPUs together; the cluster has {found}. Lower one of them or add CPU nodes in "
            "cluster.yaml."
        )
    if capacity("GPU") >= 1:
        _check_fits("teacher.num_replicas", replicas, "GPU")


def _check_fits(key: str, asked: int, kind: str) -> None:
    available = int(capacity(kind))
    if asked > available:
        raise ConfigurationError(
            f"{key}={asked} needs {asked} {kind}s; the cluster has {available}. "
            f"Lower {key} or add {kind} nodes in cluster.yaml."
        )
