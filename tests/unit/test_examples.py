"""The examples: stand-in teachers over HTTP, generated tickets, and both programs."""

import csv
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from hypothesis import given
from hypothesis import strategies as st

from distill.config_file import load_config
from examples.banking77 import program as banking77
from examples.banking77 import recorded_teacher
from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background
from examples.tickets import phrases, words
from examples.tickets import program as tickets_program
from examples.tickets.generate import NO_ORDER, make_splits, read_tickets, write_splits
from examples.tickets.teacher import make_answer

pytestmark = pytest.mark.dspy

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = [dspy.ChatAdapter(), dspy.JSONAdapter()]
TRAIN, TEST = make_splits(1500, 300)


class Sort(dspy.Signature):
    """Sort a note."""

    note: str = dspy.InputField()
    hint: str = dspy.InputField()
    shelf: Literal["top", "bottom"] = dspy.OutputField()
    reason: str = dspy.OutputField()


def post(url, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def get(url):
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def ask(answer, adapter, signature, **inputs):
    """What DSPy would make of the teacher's reply to this predictor's prompt."""
    return adapter.parse(signature, answer(adapter.format(signature, [], inputs)))


# Prompts ----------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=60).filter(
    lambda text: "[[ ##" not in text and "Respond with" not in text
)


@pytest.mark.parametrize("adapter", ADAPTERS)
@given(note=texts, hint=texts)
def test_a_prompt_is_read_back_exactly_and_the_reply_parses(adapter, note, hint):
    prompt = read_prompt(adapter.format(Sort, [], {"note": note, "hint": hint}))
    assert prompt.inputs == {"note": note, "hint": hint}
    assert prompt.outputs == ("shelf", "reason")
    reply = prompt.reply({"shelf": "top", "reason": "it fits", "other": "not asked for"})
    assert adapter.parse(Sort, reply) == {"shelf": "top", "reason": "it fits"}


def test_demonstrations_do_not_change_what_is_read():
    demo = dspy.Example(note="an old note", hint="h", shelf="bottom", reason="heavy")
    prompt = read_prompt(dspy.ChatAdapter().format(Sort, [demo], {"note": "new", "hint": "h"}))
    assert prompt.inputs["note"] == "new"


def test_another_kind_of_prompt_is_refused():
    with pytest.raises(TeacherRefuses, match="DSPy's chat and JSON prompts") as refusal:
        read_prompt([{"role": "user", "content": "Hello?"}])
    assert refusal.value.status == 400


# The server -------------------------------------------------------------------------------


def test_the_server_answers_in_openai_shape_and_lists_its_model():
    with serve_in_background(StandInTeacher(lambda messages: "12345678")) as server:
        messages = [{"role": "user", "content": "x" * 40}]
        reply = post(f"{server.api_base}/chat/completions", {"model": "m", "messages": messages})
        models = get(f"{server.url}/v1/models")
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "12345678"}
    assert reply["usage"] == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    assert [model["id"] for model in models["data"]] == ["stand-in-teacher"]


def test_the_server_counts_every_call_made_side_by_side():
    teacher = StandInTeacher(lambda messages: messages[-1]["content"], latency_s=0.01)
    with serve_in_background(teacher) as server, ThreadPoolExecutor(16) as pool:

        def echo(number):
            body = {"messages": [{"role": "user", "content": str(number)}]}
            return post(f"{server.api_base}/chat/completions", body)

        replies = list(pool.map(echo, range(100)))
        assert get(f"{server.url}/stats") == {"calls": 100}
    assert [r["choices"][0]["message"]["content"] for r in replies] == [*map(str, range(100))]
    assert len({reply["id"] for reply in replies}) == 100


def test_a_refusal_becomes_an_http_error_with_retry_after():
    def answer(messages):
        raise TeacherRefuses(429, "slow down", retry_after=2)

    with serve_in_background(StandInTeacher(answer)) as server:
        with pytest.raises(urllib.error.HTTPError, match="429") as error:
            post(f"{server.api_base}/chat/completions", {"messages": []})
        assert error.value.headers["Retry-After"] == "2"
        assert json.load(error.value)["error"]["message"] == "slow down"
        assert get(f"{server.url}/stats") == {"calls": 1}


def test_a_body_without_messages_is_a_bad_request():
    with (
        serve_in_background(StandInTeacher(lambda messages: "")) as server,
        pytest.raises(urllib.error.HTTPError, match="400"),
    ):
        post(f"{server.api_base}/chat/completions", ["no messages"])


def test_the_port_is_free_again_after_close():
    server = serve_in_background(StandInTeacher(lambda messages: ""))
    port = int(server.url.rsplit(":", 1)[1])
    server.close()
    with serve_in_background(StandInTeacher(lambda messages: ""), port) as again:
        assert again.url == server.url


def test_a_dspy_program_runs_against_the_server():
    ticket = next(t for t in TEST if t.order_id != NO_ORDER)
    teacher = StandInTeacher(make_answer([ticket]))
    with serve_in_background(teacher) as server:
        lm = dspy.LM(
            "openai/stand-in-teacher",
            api_base=server.api_base,
            api_key="not-a-key",
            temperature=0.0,
            cache=False,
        )
        with dspy.context(lm=lm):
            prediction = tickets_program.build()(ticket=ticket.ticket)
    assert tickets_program.metric(ticket, prediction)
    assert teacher.calls == 2
    assert lm.history[-1]["usage"]["completion_tokens"] > 0


def test_the_ticket_teacher_says_where_it_listens_and_ends_when_interrupted(tmp_path):
    write_splits(tmp_path, num_train=5, num_test=5)
    command = [sys.executable, "-m", "examples.tickets.teacher", "--data", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        url = json.loads(process.stdout.readline())["url"]
        assert get(f"{url}/stats") == {"calls": 0}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


# Tickets ----------------------------------------------------------------------------------


def longest_literal(template):
    return max(re.split(r"\{\w+\}", template.lower()), key=len).strip(" ,.")


def has_any(tickets, literals):
    return [any(text in ticket.ticket.lower() for text in literals) for ticket in tickets]


KINDS = [phrases.PROBLEMS, phrases.REQUESTS, phrases.URGENCY, {"": phrases.ORDERS}]


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_phrase_is_in_train(kind):
    held_out = [phrase for wording in kind.values() for phrase in wording.held_out if phrase]
    literals = [longest_literal(phrase) for phrase in held_out]
    assert [text for text in literals if any(has_any(TRAIN, [text]))] == []
    assert [text for text in literals if not any(has_any(TEST, [text]))] == []


def test_the_problem_of_a_test_ticket_is_told_in_a_held_out_phrase():
    held_out = [phrase for wording in phrases.PROBLEMS.values() for phrase in wording.held_out]
    found = has_any(TEST, [longest_literal(phrase) for phrase in held_out])
    assert sum(found) > 0.9 * len(TEST)  # the rest carry a typing mistake there


def test_held_out_words_are_in_the_test_split_only():
    def present(word, tickets):
        return any(re.search(rf"\b{word}\b", ticket.ticket.lower()) for ticket in tickets)

    held_out = [word.lower() for wording in words.WORDS.values() for word in wording.held_out]
    assert [word for word in held_out if present(word, TRAIN)] == []
    assert sum(present(word, TEST) for word in held_out) > 0.8 * len(held_out)


def test_no_ticket_comes_twice_and_no_order_number_is_in_both_splits():
    assert len({ticket.ticket for ticket in TRAIN + TEST}) == 1800
    in_both = {t.order_id for t in TRAIN} & {t.order_id for t in TEST}
    assert in_both == {NO_ORDER}


def test_the_truth_stands_in_the_text():
    for ticket in TRAIN + TEST:
        assert ticket.product.lower() in ticket.ticket.lower()
        assert sum(name.lower() in ticket.ticket.lower() for name in words.PRODUCTS) == 1
        found = set(re.findall(r"\b[A-M]\d-[N-Z]\d\b", ticket.ticket)) or {NO_ORDER}
        assert found == {ticket.order_id}
        assert 15 <= len(ticket.ticket.split()) <= 45


def test_answering_as_the_nearest_training_ticket_fails():
    train = [(set(ticket.ticket.lower().split()), ticket) for ticket in TRAIN]

    def nearest(ticket):
        ours = set(ticket.ticket.lower().split())
        return max(train, key=lambda pair: len(ours & pair[0]) / len(ours | pair[0]))[1]

    right = sum(tickets_program.metric(ticket, nearest(ticket)) for ticket in TEST[:100])
    assert right < 20


def test_tickets_are_the_same_for_the_same_seed_only(tmp_path):
    train, test = write_splits(tmp_path, num_train=20, num_test=10, seed=3)
    assert (read_tickets(train), read_tickets(test)) == make_splits(20, 10, seed=3)
    assert make_splits(20, 10, seed=3) != make_splits(20, 10, seed=4)


def test_the_test_split_does_not_depend_on_the_size_of_train():
    assert make_splits(5, 50)[1] == make_splits(100, 50)[1]


# The ticket teacher -----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_ticket_teacher_errs_as_often_as_it_says(adapter):
    tickets = make_splits(3000, 1000, seed=1)
    answer = make_answer(tickets[0] + tickets[1])
    wrong_triage = wrong_extraction = unparseable = 0
    for ticket in tickets[0] + tickets[1]:
        try:
            triage = ask(answer, adapter, tickets_program.Triage, ticket=ticket.ticket)
            wrong_triage += triage != {"queue": ticket.queue, "urgency": ticket.urgency}
            inputs = {"ticket": ticket.ticket, "queue": triage["queue"]}
            found = ask(answer, adapter, tickets_program.Extract, **inputs)
            wrong_extraction += found != {"product": ticket.product, "order_id": ticket.order_id}
        except AdapterParseError:
            unparseable += 1
    assert 0.03 < wrong_triage / 4000 < 0.05
    assert 0.006 < wrong_extraction / 4000 < 0.014
    assert 0.006 < unparseable / 4000 < 0.014  # 1 in 200 replies, two replies a ticket


def test_the_ticket_teacher_always_says_the_same():
    messages = [
        dspy.ChatAdapter().format(tickets_program.Triage, [], {"ticket": ticket.ticket})
        for ticket in TEST
    ]
    first, second = make_answer(TRAIN + TEST), make_answer(TEST)
    assert [first(m) for m in messages] == [second(m) for m in messages]


def test_a_ticket_that_the_teacher_does_not_know_is_refused():
    with pytest.raises(TeacherRefuses, match="only the generated tickets"):
        ask(make_answer(TEST), ADAPTERS[0], tickets_program.Triage, ticket="Hello?")


def test_the_ticket_metric_needs_all_four_right():
    ticket = TEST[0]
    assert tickets_program.metric(ticket, dspy.Prediction(**vars(ticket)))
    for field in tickets_program.FIELDS:
        wrong = dspy.Prediction(**vars(ticket) | {field: "wrong"})
        assert not tickets_program.metric(ticket, wrong)


# Banking77 --------------------------------------------------------------------------------


def _write(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def recording(tmp_path):
    train = [("Where is my card?", "x"), ("\nHow do I top up?\n", "x")]
    test = [("How do I top up?", "x"), ("\nWhere is my card?", "x")]
    answers = [("train", 0, "card_arrival"), ("train", 1, "top_up_limits")]
    answers += [("test", 0, "top_up_failed"), ("test", 1, "lost_or_stolen_card")]
    _write(tmp_path / "train.csv", ("text", "category"), train)
    _write(tmp_path / "test.csv", ("text", "category"), test)
    _write(tmp_path / "teacher_answers.csv", ("split", "row", "answer"), answers)
    return recorded_teacher.read_recording(tmp_path)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Where is my card?", "card_arrival"),
        ("\nWhere is my card?", "lost_or_stolen_card"),
        ("\nHow do I top up?\n", "top_up_limits"),
        ("  How do I top up?", "top_up_failed"),
    ],
)
def test_the_recorded_teacher_replays_the_answer_to_the_text(recording, adapter, text, category):
    answer = recorded_teacher.make_answer(recording)
    assert ask(answer, adapter, banking77.Classify, text=text) == {"category": category}


def test_a_question_that_was_not_recorded_is_refused(recording):
    with pytest.raises(TeacherRefuses, match="only the recorded questions"):
        ask(recorded_teacher.make_answer(recording), ADAPTERS[0], banking77.Classify, text="?")


def test_banking77_has_its_77_intents_sorted():
    intents = get_args(banking77.Category)
    assert len(set(intents)) == 77
    assert list(intents) == sorted(intents)


def test_the_banking77_metric_is_exact_match():
    example = dspy.Example(text="?", category="change_pin")
    assert banking77.metric(example, dspy.Prediction(category="change_pin"))
    assert not banking77.metric(example, dspy.Prediction(category="pin_blocked"))


# Configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["tickets", "banking77"])
def test_the_configuration_of_an_example_is_valid(example):
    config = load_config(ROOT / "examples" / example / "config.yaml")
    assert config.name == example
    assert Path(config.storage).resolve() == ROOT / "runs"
