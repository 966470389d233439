"""What the distribution promises: its dependencies, its layout, a command line that starts fast."""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
HEAVY = {"ray", "torch", "transformers", "deepspeed", "dspy", "litellm"}

# Decisions and data: tested without a cluster, and importable where there is none.
PURE = [
    "distill.config",
    "distill.datasets",
    "distill.evaluation.report",
    "distill.evaluation.statistics",
    "distill.rows",
    "distill.tracing.limits",
    "distill.tracing.store",
    "distill.tracing.trace",
    "distill.training.batches",
    "distill.training.deepspeed_config",
    "serve.errors",
    "serve.folding",
]


def _requirements(*extras: str) -> list[Requirement]:
    lines = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][name] for name in extras)]
    return [Requirement(line) for line in itertools.chain(*lines)]


def _pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _imported_modules(source: Path) -> Iterator[str]:
    """Names of the modules that a file imports anywhere, as `a.b` for `from a.b import c`."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _modules_loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after a fresh interpreter ran the statement."""
    probe = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy():
    call = (
        "from distill.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert not done.code"
    )
    assert not _modules_loaded_by(call) & HEAVY


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_loads_neither_ray_nor_torch(module):
    assert not _modules_loaded_by(f"import {module}") & {"ray", "torch", "deepspeed"}


def test_the_console_script_is_a_function_that_exists():
    (script,) = [
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "raydistill"
    ]
    assert callable(script.load())


@pytest.mark.parametrize(
    ("folder", "extras"), [("distill", ["hub", "lora"]), ("serve", []), ("examples", ["dev"])]
)
def test_every_third_party_import_is_a_declared_dependency(folder, extras):
    declared = {canonicalize_name(requirement.name) for requirement in _requirements(*extras)}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        f"{source.relative_to(ROOT)}: {module}"
        for source in _sources(folder)
        for module in _imported_modules(source)
        for names in [distributions.get(module.split(".")[0], ["raydistill"])]
        if not {"raydistill", *declared} & {canonicalize_name(name) for name in names}
    }
    assert undeclared == set()


def test_the_constraints_pin_every_direct_dependency_within_its_range():
    pins = _pins()
    for requirement in _requirements("hub", "s3", "dev"):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_the_constraints_hold_exact_versions_and_nothing_of_one_machine():
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\d[\w.]*", line) for line in lines)


def test_serve_imports_nothing_from_distill():
    found = {
        f"{source.relative_to(ROOT)}: {module}"
        for source in _sources("serve")
        for module in _imported_modules(source)
        if module.split(".")[0] == "distill"
    }
    assert found == set()


def test_ray_serve_is_never_imported_under_the_name_of_our_own_package():
    found = {
        str(source.relative_to(ROOT))
        for source in _sources("distill", "serve", "examples", "benchmarks", "tests")
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "ray"
        if any(alias.name == "serve" for alias in node.names)
    }
    assert found == set()


@pytest.mark.parametrize("package", ["distill", "serve"])
def test_no_test_package_shadows_one_of_ours(package):
    assert not (ROOT / "tests" / package / "__init__.py").exists()


def test_the_licence_is_the_one_that_is_declared():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
