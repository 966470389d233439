"""A plain Hugging Face model that knows the mood of the tests' texts, made in seconds.

Its chat template shows it no more of a prompt for ``tests.programs.Sentiment`` than the text.
"""

from pathlib import Path

import dspy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import ScratchConfig
from distill.training.base_model import make_scratch
from tests.programs import Sentiment
from tests.runs import BAD, GOOD, mood_of

SIZES = ScratchConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
)
TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set parts = 2 * m.content.split(' ]]') -%}"
    "<|user|>{{ parts[1].split('\\n\\n')[0] }}"
    "{%- elif m.role == 'assistant' -%}<|assistant|>{{ m.content }}<|end|>{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
ENOUGH = 0.01


def make_teacher(folder: Path) -> Path:
    """Write the model's directory."""
    words = 3 * (*GOOD, *BAD)
    chats = [_chat(f"day {37 * number} was {word}") for number, word in enumerate(words)]
    make_scratch(folder, chats, SIZES, max_length=2048, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    # Padded on the left: the answers, all of one length, stand at the end.
    labels = batch["input_ids"].clone()
    labels[:, : -len(tokenizer(chats[0][-1]["content"])["input_ids"]) - 1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(1.0)
    while loss > ENOUGH:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def _chat(text: str) -> list[dict[str, str]]:
    adapter = dspy.ChatAdapter()
    answer = adapter.format_assistant_message_content(Sentiment, {"mood": mood_of(text)})
    prompt = adapter.format(Sentiment, [], {"text": text})
    return [*prompt, {"role": "assistant", "content": answer}]
