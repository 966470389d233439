"""The application knows before it starts what would keep it from starting."""

import socket

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

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
