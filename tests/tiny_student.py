"""A real student, tiny and made in seconds, and the program that it answers for.

The model has learned its three rows by heart, so what it answers parses.
"""

from pathlib import Path
from typing import Any, Literal

import dspy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from serve.folding import Folding
from serve.patterns import completion_pattern
from serve.programs import describe_signature
from serve.student import Manifest, class_path

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]


class Triage(dspy.Signature):
    """Route a support ticket."""

    text: str = dspy.InputField(desc="the ticket")
    team: Literal["billing", "tech", "sales"] = dspy.OutputField(desc="who answers")
    urgent: bool = dspy.OutputField()


class Desk(dspy.Module):
    """One predictor; raises for a ticket that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.triage = dspy.Predict(Triage)

    def forward(self, text: str) -> dspy.Prediction:
        if text == "crash":
            raise RuntimeError("the program is broken")
        return self.triage(text=text)


class AsyncDesk(Desk):
    """The same, asynchronous."""

    async def aforward(self, text: str) -> dspy.Prediction:
        return await self.triage.acall(text=text)


class OpenDesk(Desk):
    """The same, but closed until its setup hook has opened it."""

    opened = False

    def forward(self, text: str) -> dspy.Prediction:
        if not self.opened:
            raise RuntimeError("the desk is closed")
        return super().forward(text=text)


async def open_desk(program: dspy.Module) -> None:
    """A setup hook."""
    program.opened = True


def jam_desk(program: dspy.Module) -> None:
    """A setup hook that fails."""
    raise OSError("the drawer is jammed")


class HeadedAdapter(dspy.ChatAdapter):
    """An adapter with an argument that shows in its prompts."""

    def __init__(self, heading: str = "no heading") -> None:
        super().__init__()
        self.heading = heading

    def format_task_description(self, signature: Any) -> str:
        return f"{self.heading}\n{super().format_task_description(signature)}"


ROWS = [
    ("the invoice is wrong", "billing", False),
    ("nothing works, help now", "tech", True),
    ("do you sell ¦ to schools?", "sales", False),
]


def build() -> dspy.Module:
    """The program's factory; it comes with an LM that must not be asked."""
    program = Desk()
    program.set_lm(dspy.LM("openai/not-to-be-asked", api_key="none", api_base="http://127.0.0.1:1"))
    return program


def build_async() -> dspy.Module:
    """The asynchronous program's factory."""
    return AsyncDesk()


def build_open() -> dspy.Module:
    """The factory of a program that needs its setup hook."""
    return OpenDesk()


def build_headed() -> dspy.Module:
    """A factory that sets its adapter, as a program may."""
    dspy.configure(adapter=HeadedAdapter("The desk's program"))
    return Desk()


def make_student(
    folder: Path,
    factory: str = "tests.tiny_student:build",
    epochs: int = 80,
    adapter: dspy.Adapter | None = None,
) -> Path:
    """Write a whole student directory and return it; without epochs it has learned nothing."""
    adapter = adapter or dspy.ChatAdapter()
    folding = Folding.learn({"triage": (Triage, [])}, adapter)
    rows = [folding.fold_row(_row(adapter, *row)) for row in ROWS]
    chats = [row.messages for row in rows if row is not None]
    tokenizer = _tokenizer(chats)
    _model(tokenizer, chats, epochs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build().save(str(folder / "program.json"))
    manifest(folding, factory, adapter).save(folder)
    return folder


def manifest(folding: Folding, factory: str, adapter: dspy.Adapter | None = None) -> Manifest:
    """The manifest of the tiny student."""
    adapter = adapter or dspy.ChatAdapter()
    return Manifest(
        program=factory,
        inputs=["text"],
        outputs=["team", "urgent"],
        predictors={"triage": describe_signature(Triage)},
        adapter=class_path(adapter),
        base_model="scratch",
        folding=folding.to_json(),
        grammar={"triage": completion_pattern(Triage, adapter, folding, "triage")},
        max_new_tokens=12,
        created="2026-01-01T00:00:00+00:00",
    )


def _row(adapter: dspy.Adapter, text: str, team: str, urgent: bool) -> list[dict[str, Any]]:
    outputs = {"team": team, "urgent": urgent}
    messages = adapter.format(Triage, [], {"text": text})
    completion = adapter.format_assistant_message_content(Triage, outputs)
    return [*messages, {"role": "assistant", "content": completion}]


def _tokenizer(chats: list[list[dict[str, Any]]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for chat in chats for m in chat), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def _model(tokenizer: Any, chats: list[list[dict[str, Any]]], epochs: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
