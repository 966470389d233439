"""Runs a student's program on one set of inputs, without stalling the event loop.

Owns how the program, the student's LM and the adapter come together. What a failure
means over HTTP is for ``http_api``.
"""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy

from serve.dspy_lm import student_adapter, student_lm
from serve.engines.base import Complete
from serve.programs import as_prediction, runs_async, set_up
from serve.schema import Form, input_form, output_form, to_json
from serve.student import load_student
from serve.threads import allow_threads


class ProgramRunner:
    """The program of a student directory, ready to run.

    Args:
        student_dir: The student directory.
        complete: Answers the predictors' calls, on the loop that ``run`` is called on.
        concurrency: Most runs of a synchronous program at once; others wait.
        name: The name that usage shows for the student.

    Raises:
        StudentError: The program or its adapter cannot be loaded, or has changed.
    """

    def __init__(self, student_dir: str, complete: Complete, concurrency: int, name: str) -> None:
        allow_threads()
        student = load_student(student_dir)
        manifest = student.manifest
        self._program = student.program
        self._setup = student.setup
        self._adapter = student_adapter(student.adapter)
        self._complete = complete
        self._name = name
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="program")
        self._outputs = manifest.outputs
        self.input_form: type[Form] = input_form(self._program, manifest.inputs)
        self.output_form: type[Form] = output_form(self._program, manifest.outputs)

    async def start(self) -> None:
        """Set the program up; before the first run, on the same loop.

        Raises:
            ConfigurationError: Its setup hook raised.
        """
        if self._setup is not None:
            await set_up(self._program, self._setup)

    async def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The program's outputs as JSON values; null for one that it did not set.

        Raises:
            Exception: Whatever the program raises.
        """
        loop = asyncio.get_running_loop()
        lm = student_lm(self._complete, loop, self._name)
        # A trace and histories of its own: DSPy's process-wide ones would keep every prompt.
        context = dspy.context(lm=lm, adapter=self._adapter, disable_history=True, trace=[])
        if runs_async(self._program):
            with context:
                prediction = await self._program.acall(**inputs)
        else:

            def call() -> dspy.Prediction:
                with context:
                    return self._program(**inputs)

            # The thread takes the request's context variables along.
            run = contextvars.copy_context().run
            prediction = await loop.run_in_executor(self._threads, run, call)
        values = as_prediction(prediction).toDict()
        return {name: to_json(values.get(name)) for name in self._outputs}
