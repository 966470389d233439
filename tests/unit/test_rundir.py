"""The run directory: the same on a local folder and on a remote filesystem."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.rundir import RunDir
from serve.errors import ConfigurationError
from serve.files import local_folder


@pytest.fixture(params=["local", "memory"])
def directory(request, tmp_path):
    uri = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    directory = RunDir(uri)
    directory.create()
    return directory


def test_json_comes_back_and_what_is_missing_is_none(directory):
    directory.write_json("a/b.json", {"x": "ÿ"})
    assert directory.read_json("a/b.json") == {"x": "ÿ"}
    assert directory.read_json("none.json") is None
    assert directory.exists("a/b.json")
    assert not directory.exists("none.json")


def test_many_may_make_the_same_directory_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(RunDir(str(tmp_path / "run")).create) for _ in range(200)]
    assert [each.result() for each in made] == 200 * [None]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_is_replaced_whole(directory):
    for content in ("old", "new"):
        with directory.replacing("student", seal="new.txt") as folder:
            (folder / f"{content}.txt").write_text(content)
    with local_folder(directory.join("student")) as folder:
        assert [path.name for path in folder.iterdir()] == ["new.txt"]


def test_a_folder_that_fails_while_it_is_filled_leaves_the_old_one(directory):
    with directory.replacing("student", seal="new.txt") as folder:
        (folder / "a.txt").write_text("kept")

    with pytest.raises(FileNotFoundError), directory.replacing("student", seal="new.txt") as folder:
        (folder / "b.txt").write_text((folder / "none.txt").read_text())
    with local_folder(directory.join("student")) as folder:
        assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_appending_goes_on_where_it_stopped(directory):
    for number in range(2):
        with directory.appending("events.jsonl") as path, path.open("a") as file:
            file.write(json.dumps({"n": number}) + "\n")
    with directory.appending("events.jsonl") as path:
        assert path.read_text().splitlines() == ['{"n": 0}', '{"n": 1}']


def test_storage_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be used"):
        RunDir("nope://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        RunDir(str(tmp_path / "file" / "run")).create()


def test_two_runs_do_not_work_in_one_local_directory(tmp_path):
    directory = RunDir(str(tmp_path))
    refused = pytest.raises(ConfigurationError, match="another run is at work")
    with directory.locked(), refused, directory.locked():
        pass
    with directory.locked():
        pass
