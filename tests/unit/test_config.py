"""The configuration: what is valid, what is refused, and what the refusal says."""

import textwrap

import pytest

from distill.config import RunConfig
from distill.config_file import load_config
from serve.errors import ConfigurationError

GOOD = {
    "name": "demo",
    "program": "tests.programs:build",
    "data": {"train": "train.csv", "test": "test.csv", "inputs": ["text"]},
    "teacher": {"lm": {"model": "openai/gpt-4o-mini"}},
}


@pytest.fixture
def write(tmp_path):
    import yaml

    def write(changes=None, text=None):
        path = tmp_path / "config.yaml"
        path.write_text(text if text is not None else yaml.safe_dump({**GOOD, **(changes or {})}))
        return path

    return write


def test_defaults_are_those_of_the_design(write):
    config = load_config(write())
    assert config.trace.actors == 2
    assert config.trace.max_failure_rate == 0.2
    assert config.student.model == "scratch"
    assert config.student.prompt == "folded"
    assert config.train.zero_stage == 2
    assert config.train.save_strategy == "epoch"


def test_a_model_is_fine_tuned_as_transformers_would(write):
    train = load_config(write({"student": {"model": "org/m"}})).train
    assert (train.learning_rate, train.num_train_epochs) == (5e-5, 3)
    assert (train.per_device_train_batch_size, train.weight_decay) == (8, 0.01)


def test_a_scratch_student_gets_a_recipe_of_its_own(write):
    train = load_config(write()).train
    assert (train.learning_rate, train.num_train_epochs) == (1e-3, 12)
    assert (train.per_device_train_batch_size, train.weight_decay) == (32, 0.1)


def test_a_given_value_wins_even_where_it_is_the_default_of_fine_tuning(write):
    train = load_config(write({"train": {"learning_rate": 5e-5, "weight_decay": 0.0}})).train
    assert (train.learning_rate, train.weight_decay) == (5e-5, 0.0)
    assert train.num_train_epochs == 12


def test_a_configuration_written_down_whole_says_the_same_again(write):
    config = load_config(write())
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(
    write, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(write(), ["data.test=mine.csv"])
    assert config.data.train == str(tmp_path / "train.csv")
    assert config.data.test == str(elsewhere / "mine.csv")
    assert config.storage == str(tmp_path / "runs")


def test_uris_and_hub_ids_stay_as_they_are(write):
    config = load_config(
        write(), ["storage=s3://bucket/runs", "data.train=hf:org/set:train", "student.model=org/m"]
    )
    assert config.storage == "s3://bucket/runs"
    assert config.data.train == "hf:org/set:train"
    assert config.student.model == "org/m"


def test_a_student_directory_beside_the_file_is_found(write, tmp_path):
    (tmp_path / "base").mkdir()
    assert load_config(write({"student": {"model": "base"}})).student.model == str(
        tmp_path / "base"
    )


def test_overrides_are_read_as_yaml(write):
    config = load_config(write(), ["train.num_workers=1", "train.deepspeed={a: {b: 1}}"])
    assert config.train.num_workers == 1
    assert config.train.deepspeed == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trian": {}}, "did you mean train?"),
        ({"train": {"num_worker": 2}}, "did you mean num_workers?"),
        ({"train": {"num_workers": "two"}}, "train.num_workers"),
        ({"train": {"zero_stage": 7}}, "train.zero_stage"),
        ({"train": {"seed": -1}}, "train.seed"),
        ({"train": {"save_strategy": "never"}}, "'no', 'epoch' or 'steps'"),
        ({"train": {"epochs": 2}}, "did you mean num_train_epochs? Known keys: "),
        ({"int": 2}, "int: unknown key"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"trace": {"budget_usd": -1}}, "trace.budget_usd"),
        ({"trace": {"max_failure_rate": 2}}, "trace.max_failure_rate"),
        ({"trace": {"metric_threshold": 0.5}}, "needs a metric"),
        ({"student": {"prompt": "fold"}}, "student.prompt"),
        ({"student": {"scratch": {"hidden_size": 30}}}, "hidden_size=30"),
        ({"serve": {"replicas": {"min": 9}}}, "min=9 is more than max=4"),
        ({"program": "tests/programs.py"}, "package.module:name"),
        ({"name": "a/b"}, "letters, digits"),
        ({"teacher": {"lm": {"temperature": 0}}}, "teacher.lm needs a model"),
        ({"teacher": {"lm": {"model": "m", "api_key": "sk-1"}}}, "environment"),
        ({"data": {"train": "a.csv", "test": "b.csv", "inputs": []}}, "data.inputs"),
        ({"data": None}, "data"),
        ({"train": {"save_steps": 9}}, "save_strategy=steps"),
        ({"train": {"eval_steps": 9}}, "eval_strategy=steps"),
        ({"train": {"early_stopping_patience": 2, "save_strategy": "no"}}, "save_strategy=epoch"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(write, changes, said):
    with pytest.raises(ConfigurationError) as caught:
        load_config(write(changes))
    assert said in str(caught.value)
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": "sk-1"},
        {"aws_secret_access_key": "sk-1"},
        {"hf_token": "sk-1"},
        {"extra_headers": {"Authorization": "Bearer sk-1"}},
        {"extra_headers": {"x-api-key": "sk-1"}},
        {"api_base": "https://me:sk-1@host/v1"},
    ],
)
def test_no_secret_gets_into_a_configuration(write, extra):
    with pytest.raises(ConfigurationError, match="environment") as caught:
        load_config(write({"teacher": {"lm": {"model": "m", **extra}}}))
    assert "sk-1" not in str(caught.value)


def test_settings_that_only_sound_like_secrets_are_taken(write):
    settings = {"model": "m", "max_tokens": 9, "max_completion_tokens": 9, "api_base": "http://h:1"}
    assert load_config(write({"teacher": {"lm": settings}})).teacher.lm == settings


def test_paths_in_an_overridden_section_are_relative_to_the_working_directory(
    write, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(write(), ["data={train: a.csv, test: b.csv, inputs: [text]}"])
    assert config.data.train == str(elsewhere / "a.csv")


def test_every_mistake_is_said_at_once(write):
    with pytest.raises(ConfigurationError) as caught:
        load_config(write({"trian": {}, "trace": {"actors": 0}}))
    assert "trian" in str(caught.value)
    assert "trace.actors" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "just words"])
def test_a_file_that_is_no_configuration_is_refused(write, text):
    with pytest.raises(ConfigurationError):
        load_config(write(text=text))


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="not a text file"):
        load_config(binary)


@pytest.mark.parametrize("override", ["train", "=1", "train..x=1", "name.x=1", "a.b=["])
def test_an_override_that_is_none_is_refused(write, override):
    with pytest.raises(ConfigurationError):
        load_config(write(), [override])


def test_the_readme_style_of_comments_is_yaml(write):
    text = textwrap.dedent(
        """\
        name: demo   # the run's name
        program: tests.programs:build
        data: {train: a.csv, test: b.csv, inputs: [text]}
        teacher: {lm: {model: openai/gpt-4o-mini}}
        """
    )
    assert load_config(write(text=text)).name == "demo"
