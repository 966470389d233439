"""A stand-in teacher for Banking77 that replays recorded answers.

    python -m examples.banking77.recorded_teacher --data DIR [--port 8100] [--latency-ms 20]

DIR holds train.csv and test.csv (text, category) and teacher_answers.csv (split, row,
answer; rows count from 0). The truth in ``category`` is not read. A question is looked up
by its exact text, else without surrounding whitespace; where one text then has two
recordings, the test split's is told, so that the teacher's score on the test set is
exactly the recorded one.
"""

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.chat_prompts import read_prompt
from examples.standin_teacher import Answer, StandInTeacher, TeacherRefuses, serve_forever


def read_recording(folder: Path) -> dict[str, str]:
    """Question text -> recorded answer."""
    answers = {
        (row["split"], int(row["row"])): row["answer"]
        for row in _rows(folder / "teacher_answers.csv")
    }
    exact = {
        row["text"]: answers[split, number]
        for split in ("train", "test")
        for number, row in enumerate(_rows(folder / f"{split}.csv"))
    }
    return {text.strip(): answer for text, answer in exact.items()} | exact


def make_answer(recording: Mapping[str, str]) -> Answer:
    """An ``answer`` function that knows the recorded questions and no others."""

    def answer(messages: list[dict]) -> str:
        prompt = read_prompt(messages)
        text = prompt.inputs.get("text", "")
        category = recording.get(text, recording.get(text.strip()))
        if category is None:
            raise TeacherRefuses(400, "the stand-in teacher knows only the recorded questions")
        return prompt.reply({"category": category})

    return answer


def _rows(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Replay a recorded teacher of Banking77.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="delay of each answer")
    args = parser.parse_args()
    for name in ("train.csv", "test.csv", "teacher_answers.csv"):
        if not (args.data / name).is_file():
            parser.error(
                f"{args.data / name}: no such file; see {Path(__file__).parent.name}/README.md."
            )
    answer = make_answer(read_recording(args.data))
    serve_forever(StandInTeacher(answer, args.latency_ms / 1000), port=args.port)


if __name__ == "__main__":
    main()
