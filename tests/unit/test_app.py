"""The application knows before it starts what would keep it from starting."""

import socket

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from distill.export import app_args
from distill.rundir import RunDir
from serve import cluster
from serve.app import AppArgs, build, run, serve_yaml
from serve.errors import ConfigurationError, StudentError


def test_a_taken_port_is_told_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="--port"):
            run(AppArgs(student=str(tmp_path)), port=taken.getsockname()[1])


def test_a_missing_key_or_student_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ConfigurationError, match="NOT_SET_ANYWHERE"):
        build(AppArgs(student=str(tmp_path), api_key_env="NOT_SET_ANYWHERE"))
    with pytest.raises(StudentError, match="no such file"):
        build(AppArgs(student=str(tmp_path)))


def test_the_yaml_is_one_that_serve_deploy_takes(tmp_path):
    args = AppArgs(student=str(tmp_path), api_key_env="A_KEY")
    config = ServeDeploySchema.model_validate(yaml.safe_load(serve_yaml(args, port=8123)))
    application = config.applications[0]
    assert application.import_path == "serve.app:build"
    assert AppArgs.model_validate(application.args) == args
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8123)


def test_more_replicas_than_the_cluster_has_room_for_are_told(monkeypatch):
    found = {"CPU": 4.0, "GPU": 1.0}
    monkeypatch.setattr(cluster, "capacity", found.get)
    cluster.check_room({"CPU": 4, "GPU": 1}, "serve.replicas.min=2")
    with pytest.raises(
        ConfigurationError, match=r"replicas\.min=3 needs 4\.5 CPUs.* has 4\. Lower"
    ):
        cluster.check_room({"CPU": 4.5, "GPU": 0}, "serve.replicas.min=3")
    with pytest.raises(ConfigurationError, match=r"needs 2 GPUs; the cluster has 1\."):
        cluster.check_room({"CPU": 3, "GPU": 2}, "serve.replicas.min=2")


def test_a_student_directory_is_served_as_it_is(tmp_path):
    (tmp_path / "student.json").write_text("{}")
    assert app_args(RunDir(str(tmp_path))) == AppArgs(student=str(tmp_path))


def test_a_folder_that_is_no_run_directory_is_told(tmp_path):
    directory = RunDir(str(tmp_path))
    with pytest.raises(ConfigurationError, match="is no run directory"):
        app_args(directory)
    for text, message in (
        ("not json", "is not JSON"),
        ("[]", "no section serve"),
        ('{"serve": {"replicas": {"min": 0}}}', r"serve\.replicas\.min: "),
        ('{"serve": {}}', "holds no student"),
    ):
        directory.write_text("config.json", text)
        with pytest.raises(ConfigurationError, match=message):
            app_args(directory)
