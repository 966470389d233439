"""What is said when training runs out of memory. Pure: a failure and settings in, words out."""

import re

from distill.config import SCRATCH, StudentConfig, TrainConfig

_SAYS_SO = re.compile(
    r"out of memory|OutOfMemory|can't allocate memory|running low on memory", re.IGNORECASE
)
_MAY_BE = re.compile(r"OOM killer", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells of missing memory: the GPU's, the machine's, or a killed worker's."""
    return bool(_SAYS_SO.search(_text(error)) or _MAY_BE.search(_text(error)))


def out_of_memory(error: BaseException, student: StudentConfig, train: TrainConfig) -> str:
    """A message that names the settings by which training would take less memory.

    Args:
        error: What was seen.
        student: What was trained; that which saves memory already is not advised.
        train: How.
    """
    seen = str(error).strip().split("\n")[0][:300]
    advice = _advice(student, train)
    if _SAYS_SO.search(_text(error)):
        return f"Training ran out of memory: {seen} To use less: {advice}."
    return f"A training worker was killed, perhaps for its memory: {seen} To use less: {advice}."


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _advice(student: StudentConfig, train: TrainConfig) -> str:
    size, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    advice = [f"lower train.max_length={train.max_length}"]
    if size > 1:
        advice.insert(
            0,
            f"lower train.per_device_train_batch_size={size}, and raise "
            f"train.gradient_accumulation_steps={steps} as much for steps of the same size",
        )
    if train.packing:
        advice.append("set train.packing=false for sequences no longer than a row")
    if not train.gradient_checkpointing:
        advice.append("set train.gradient_checkpointing=true")
    if train.zero_stage < 3:
        advice.append(f"raise train.zero_stage={train.zero_stage}, or train.num_workers")
    # Of what is not divided yet, nothing can be offloaded.
    if train.zero_stage > 0 and not train.offload_optimizer:
        advice.append("set train.offload_optimizer=true")
    if train.zero_stage == 3 and not train.offload_param:
        advice.append("set train.offload_param=true")
    if student.lora is None and student.model != SCRATCH:
        advice.append("train adapters with student.lora={r: 16}")
    return "; ".join(advice)
