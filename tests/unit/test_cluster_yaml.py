"""cluster.yaml is what Ray's cluster launcher accepts, and safe to launch as it stands.

Checked with the launcher's own functions, up to the point where it would call AWS.
"""

import copy
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="config")
def _config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))


@pytest.fixture(name="prepared")
def _prepared(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"validation went to the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return prepare_config(copy.deepcopy(config))


def test_the_cluster_launcher_accepts_the_file(prepared):
    validate_config(prepared)


def test_no_node_listens_for_commands_beyond_itself(prepared):
    starts = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    assert not any("0.0.0.0" in command for command in starts)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_every_node_asks_for_the_token_that_every_node_gets(prepared):
    assert "-e RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert "~/.ray/auth_token" in prepared["file_mounts"]


def test_the_head_offers_no_cpus_and_gpu_workers_scale_from_zero(prepared):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    gpu = prepared["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"] > 1) == (0, True)


def test_every_image_holds_the_ray_that_the_constraints_pin(config):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]
    docker = config["docker"]
    images = [docker["head_image"], docker["worker_image"]]
    for node_type in config["available_node_types"].values():
        images += node_type.get("docker", {}).values()
    assert len(images) == 3
    assert all(image.startswith(f"rayproject/ray:{pinned}-py311-") for image in images)


def test_the_nodes_install_what_make_dist_leaves_here(config):
    assert config["file_mounts"]["~/dist"] == "dist"
    assert any("~/dist/constraints.txt" in command for command in config["setup_commands"])
