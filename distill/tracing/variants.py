"""The ways in which a program is run on an example besides the plain one.

A sample asks with a rollout of its own and a temperature; a hinted run tells every predictor
the label. Either is a change of the task and its LM; how they are run is ``tracer``.
"""

import json

import dspy

from distill.programs import Task
from distill.tracing.values import jsonable

SAMPLE_TEMPERATURE = 1.0
"""Of samples after the first, where the LM's own is 0: they would all be the same."""


def sampled(lm: dspy.BaseLM, sample: int) -> dspy.BaseLM:
    """The LM as this sample asks it; sample 0 is the LM itself."""
    if not sample:
        return lm
    temperature = lm.kwargs.get("temperature") or SAMPLE_TEMPERATURE
    # The rollout keeps a sample from being answered by the cache of another.
    twin: dspy.BaseLM = lm.copy(rollout_id=sample, temperature=temperature)
    return twin


def sampled_task(task: Task, sample: int) -> Task:
    """The task, whose own LMs are changed in place to be asked as this sample."""
    for _, module in task.program.named_sub_modules(dspy.Module):
        for name, value in list(vars(module).items()):
            if isinstance(value, dspy.BaseLM):
                setattr(module, name, sampled(value, sample))
    return task


def hinted_task(task: Task, example: dspy.Example) -> Task:
    """The task, whose predictors' instructions are changed in place to hold the label.

    Rows are rendered with the program's own instructions, so no hint reaches the student.
    """
    labels = json.dumps(jsonable(example.labels().toDict()), default=str, ensure_ascii=False)
    hint = (
        f"For this input, the task as a whole is known to end in {labels}. Let that guide your "
        "answer, and answer as you would have without being told: never mention it."
    )
    for predictor in task.program.predictors():
        signature = predictor.signature
        predictor.signature = signature.with_instructions(f"{signature.instructions}\n\n{hint}")
    return task
