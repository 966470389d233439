import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from distill.config import LoraConfig, ScratchConfig, StudentConfig
from distill.training.base_model import (
    check_base_model,
    load_model,
    load_tokenizer,
    make_scratch,
    max_positions,
)
from distill.training.encoding import LongCounts, encode, end_of_turn_id
from distill.training.lora import add_adapters
from distill.turns import as_input
from serve.errors import ConfigurationError, TrainingError

SIZES = ScratchConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def conversation(prompt, completion):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


CONVERSATIONS = [
    conversation(f"classify¦where is order {i} of grüße", f"order_status¦{i}") for i in range(40)
]
AWKWARD = [
    conversation("  spaces \n around ¦¬0 ", "\n answer \t "),
    conversation("12345", "¦"),
    [{"role": "system", "content": "be\n\nkind "}, *conversation("日本語 🙂", "ok")],
    [*conversation("a", "b"), *conversation("c", "d")],
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    make_scratch(folder, CONVERSATIONS, SIZES, max_length=512, seed=3)
    return str(folder)


@pytest.mark.parametrize("messages", AWKWARD)
def test_a_prompt_is_an_exact_prefix_of_its_conversation(scratch, messages):
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert whole[: len(prompt)] == prompt
    rest = tokenizer.decode(whole[len(prompt) :])
    assert rest == messages[-1]["content"] + tokenizer.eos_token


def test_digits_and_signs_are_tokens_of_their_own(scratch):
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    ids = tokenizer("48¦¬7")["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == ["4", "8", "¦", "¬", "7"]


def test_the_vocabulary_stays_within_what_was_asked(scratch):
    model = AutoModelForCausalLM.from_pretrained(scratch)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(scratch)) <= 320
    assert model.config.tie_word_embeddings


def test_few_texts_make_a_smaller_vocabulary(tmp_path):
    sizes = SIZES.model_copy(update={"vocab_size": 4096})
    make_scratch(tmp_path, CONVERSATIONS[:3], sizes, max_length=512, seed=0)
    assert len(load_tokenizer(str(tmp_path))) < 400


def test_the_same_rows_and_seed_make_the_same_student(scratch, tmp_path):
    make_scratch(tmp_path, CONVERSATIONS, SIZES, max_length=512, seed=3)
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        with open(f"{scratch}/{name}", "rb") as one, open(tmp_path / name, "rb") as other:
            assert one.read() == other.read()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "\ud800"},
    ],
)
def test_a_row_that_a_scratch_student_cannot_learn_is_named(tmp_path, message):
    rows = [*CONVERSATIONS, [conversation("a", "b")[0], message, *conversation("c", "d")]]
    with pytest.raises(ConfigurationError, match=r"^train row 41: .*template or tokenizer"):
        make_scratch(tmp_path, rows, SIZES, max_length=512, seed=0)


def test_positions_leave_room_beyond_the_longest_row(scratch, tmp_path):
    assert max_positions(scratch) == 512
    long = [conversation("1" * 700, "yes")]
    make_scratch(tmp_path, [*CONVERSATIONS, *long], SIZES, max_length=2048, seed=0)
    assert max_positions(str(tmp_path)) == 2048


def test_generation_stops_at_the_end_of_a_turn(scratch):
    tokenizer = load_tokenizer(scratch)
    model = load_model(scratch, tokenizer, torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("messages", AWKWARD)
def test_the_completion_is_the_answer_and_the_end_of_its_turn(scratch, messages):
    tokenizer = load_tokenizer(scratch)
    messages = [*as_input(messages[:-1]), messages[-1]]
    rows, long = encode([messages], tokenizer, max_length=512)
    assert long == LongCounts()
    completion = tokenizer.decode(rows.input_ids[rows.completion])
    assert completion == messages[-1]["content"] + "<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert rows.input_ids[~rows.completion].tolist() == prompt


def test_rows_that_are_too_long_are_left_out_and_counted(scratch):
    long = conversation("1" * 100, "yes")
    rows, counts = encode([*CONVERSATIONS, long], load_tokenizer(scratch), max_length=80)
    assert (len(rows), counts) == (len(CONVERSATIONS), LongCounts(dropped=1))


def test_no_rows_encode_to_no_rows(scratch):
    rows, counts = encode([], load_tokenizer(scratch), max_length=80)
    assert (len(rows), counts) == (0, LongCounts())


@pytest.fixture
def plain_tokenizer():
    """A tokenizer as base models have them: an end of sequence, no template, no padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: i for i, sign in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_a_tokenizer_without_a_template_gets_one(plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = tokenizer.apply_chat_template(conversation("hi", "yo"), tokenize=False)
    assert text == "<|user|>hi</s><|assistant|>yo</s>"
    assert tokenizer.pad_token == "</s>"


def test_the_end_of_turn_is_what_the_template_ends_an_answer_with(plain_tokenizer):
    plain_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    plain_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    end = plain_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(plain_tokenizer) == end
    rows, _ = encode([conversation(" q ", " a ")], plain_tokenizer, max_length=100)
    assert plain_tokenizer.convert_ids_to_tokens(rows.input_ids[rows.completion].tolist()) == [
        "Ġ",
        "a",
        "Ġ",
        "<|im_end|>",
    ]


def test_padding_with_the_end_of_sequence_hides_no_real_one(plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    rows, _ = encode([conversation("hi", "yo")], tokenizer, max_length=100)
    assert rows.input_ids[-1] == tokenizer.pad_token_id
    assert rows.token_weights(0, 0.0)[-1] == 1.0


def test_a_model_that_is_not_there_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"student\.model=.*cannot be loaded"):
        check_base_model(str(tmp_path / "nothing"))


def test_a_folder_without_safetensors_is_refused(scratch, tmp_path):
    load_tokenizer(scratch).save_pretrained(tmp_path)
    with open(f"{scratch}/config.json") as config:
        (tmp_path / "config.json").write_text(config.read())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="safetensors"):
        check_base_model(str(tmp_path))


def test_weights_that_were_cut_off_are_refused(tmp_path):
    make_scratch(tmp_path, CONVERSATIONS, SIZES, max_length=512, seed=0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is damaged"):
        check_base_model(str(tmp_path))


def test_missing_weights_are_never_made_up(scratch, tmp_path):
    make_scratch(tmp_path, CONVERSATIONS, SIZES, max_length=512, seed=0)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"model\.norm\.weight"):
        load_model(str(tmp_path), load_tokenizer(str(tmp_path)), torch.float32)


def test_a_complete_model_passes_the_check(scratch):
    check_base_model(scratch)
    check_base_model("scratch")


@pytest.mark.parametrize(
    ("size", "millions"), [("micro", (4, 5)), ("mini", (12, 15)), ("small", (40, 50))]
)
def test_a_size_has_the_parameters_that_it_is_said_to_have(size, millions):
    sizes = StudentConfig(scratch=size).scratch
    assert sizes.size == size
    with torch.device("meta"):
        config = LlamaConfig(
            **sizes.model_dump(exclude={"size", "dropout"}), tie_word_embeddings=True
        )
        count = LlamaForCausalLM(config).num_parameters()
    assert millions[0] * 1e6 < count < millions[1] * 1e6


def test_a_size_may_be_changed_in_part():
    sizes = StudentConfig(scratch={"size": "small", "num_hidden_layers": 2}).scratch
    assert (sizes.hidden_size, sizes.num_hidden_layers) == (512, 2)
    assert StudentConfig().scratch == StudentConfig(scratch="micro").scratch
    with pytest.raises(ValueError, match="micro"):
        StudentConfig(scratch="large")


def test_adapters_are_not_for_a_student_that_has_learned_nothing():
    with pytest.raises(ValueError, match="model=scratch"):
        StudentConfig(lora={"r": 4})
    assert StudentConfig(model="org/model", lora={"r": 4}).lora.r == 4


def test_a_tied_layer_gets_no_adapter(scratch):
    model = load_model(scratch, load_tokenizer(scratch), torch.float32)
    with pytest.raises(ConfigurationError, match="ties them"):
        add_adapters(model, LoraConfig(target_modules=["lm_head"]))
    model = load_model(scratch, load_tokenizer(scratch), torch.float32)
    with pytest.raises(ConfigurationError, match="nowhere"):
        add_adapters(model, LoraConfig(target_modules=["nowhere"]))
