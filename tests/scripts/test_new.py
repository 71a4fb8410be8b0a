import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from new import new_task
from rename import PACKAGE, rename

from tests.conftest import ROOT

TEMPLATE = f"src/{PACKAGE}"
WRITTEN = [
    "conf/data/houses.yaml",
    "conf/experiment/houses.yaml",
    "conf/model/houses.yaml",
    f"{TEMPLATE}/houses/__init__.py",
    f"{TEMPLATE}/houses/data.py",
    f"{TEMPLATE}/houses/model.py",
    f"tests/{PACKAGE}/test_houses.py",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this one, as a clone would be."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "outputs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "project", ignore=left_out))


def files(project: Path) -> set[str]:
    return {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}


def python(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(project / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_task_is_written_beside_the_others_and_nothing_else_is_changed(project: Path) -> None:
    before = {name: (project / name).read_bytes() for name in files(project)}
    ended = python(project, "scripts/new.py", "houses")
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if "/" in line][:-1] == WRITTEN
    assert ended.stdout.endswith("python scripts/train.py experiment=houses\n")
    assert files(project) - set(before) == set(WRITTEN)
    assert all((project / name).read_bytes() == content for name, content in before.items())
    assert not any(re.search("your_?task", (project / name).read_text(), re.IGNORECASE) for name in WRITTEN)


def test_its_experiment_names_its_own_parts(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    new_task("house_prices", tmp_path)
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        config: Any = compose("train", ["experiment=house_prices"])
    assert config.data._target_ == f"{PACKAGE}.house_prices.data.HousePricesData"
    assert config.model._target_ == f"{PACKAGE}.house_prices.model.HousePricesModel"
    assert config.optimizer.lr == config.lr == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "NAME must be snake_case, such as houses or house_prices, got ''."),
        ("1st-task", "NAME must be snake_case, such as houses or house_prices, got '1st-task'."),
        ("Houses", "NAME must be snake_case"),
        ("../houses", "NAME must be snake_case"),
        ("häuser", "NAME must be snake_case"),
        ("houses\n", "NAME must be snake_case"),
        ("class", "NAME must not be a word that Python, YAML or Hydra keeps for itself, got 'class'."),
        ("null", "NAME must not be a word"),
        ("regression", f"NAME must be a new one, got 'regression': {TEMPLATE}/regression is there already."),
        ("digits", f"NAME must be a new one, got 'digits': {TEMPLATE}/digits is there already."),
        ("train", f"NAME must be a new one, got 'train': {TEMPLATE}/train.py is there already."),
        ("diabetes", "NAME must be a new one, got 'diabetes': conf/data/diabetes.yaml is there already."),
        ("manual", "NAME must be a new one, got 'manual': conf/model/manual.yaml is there already."),
        ("edge", "NAME must be a new one, got 'edge': conf/experiment/edge.yaml is there already."),
    ],
)
def test_a_name_that_cannot_be_or_is_taken_is_refused_and_nothing_written(
    project: Path, name: str, message: str
) -> None:
    before = files(project)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        new_task(name, project)
    assert files(project) == before


@pytest.mark.parametrize("script", ["new", "rename"])
@pytest.mark.parametrize("arguments", [(), ("",), ("1st-task",)], ids=str)
def test_a_refusal_is_one_line_and_an_exit_code(project: Path, script: str, arguments: tuple[str, ...]) -> None:
    ended = python(project, f"scripts/{script}.py", *arguments)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert re.fullmatch(r"error: NAME must be snake_case, such as houses or house_prices, got '.*'\.\n", ended.stderr)


def test_a_second_task_of_one_name_is_refused(project: Path) -> None:
    new_task("houses", project)
    with pytest.raises(ValueError, match="is there already"):
        new_task("houses", project)


@pytest.mark.slow
def test_the_task_that_was_written_passes_its_own_test_and_the_checks_of_style(project: Path) -> None:
    new_task("houses", project)
    ended = python(project, "-m", "pytest", "-q", f"tests/{PACKAGE}/test_houses.py")
    assert ended.returncode == 0, ended.stdout
    for check in (["check"], ["format", "--check"]):
        ended = python(project, "-m", "ruff", *check, "--no-cache", *WRITTEN[3:])
        assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("downslope", "NAME must be a new one, got 'downslope', which is the name of something else."),
        ("torch", "NAME must be a new one, got 'torch'"),
        ("tests", "NAME must be a new one, got 'tests'"),
        ("Houses", "NAME must be snake_case"),
    ],
)
def test_a_package_is_not_given_the_name_of_another(project: Path, name: str, message: str) -> None:
    before = {each: (project / each).read_bytes() for each in files(project)}
    with pytest.raises(ValueError, match=re.escape(message)):
        rename(name, project)
    assert {each: (project / each).read_bytes() for each in files(project)} == before


def test_a_renamed_package_is_named_wherever_it_was_and_words_are_left_alone(project: Path) -> None:
    old, new = PACKAGE, "renamed"
    new_task("houses", project)
    words = project / "docs" / "words.md"
    words.write_text(f"A {old} for `{old}/digits/`, `src/{old}` and {old}.houses.data; from {old} to end, my-{old}/x.")
    values = project / "conf" / "values.yaml"
    values.write_text(f'{old}: |-\n  x: {old}.houses.model.Houses\n  y: ["{old}", {old}.render]\n')
    rename(new, project)
    assert words.read_text() == (
        f"A {old} for `{new}/digits/`, `src/{new}` and {new}.houses.data; from {old} to end, my-{old}/x."
    )
    assert values.read_text() == f'{old}: |-\n  x: {new}.houses.model.Houses\n  y: ["{new}", {old}.render]\n'
    assert {f"src/{new}/houses/model.py", f"tests/{new}/test_houses.py"} <= files(project)
    left = re.compile(rf"^(from|import) {old}\b|(src|tests)/{old}\b|_target_: {old}\.", re.MULTILINE)
    for name in files(project):
        assert old not in Path(name).parts
        if name.endswith((".py", ".yaml", ".md", ".toml")):
            assert not left.search((project / name).read_text()), name


@pytest.mark.slow
def test_a_renamed_project_makes_tasks_passes_their_tests_and_can_be_renamed_again(project: Path) -> None:
    for name in ("renamed", "renamed_again"):
        ended = python(project, "scripts/rename.py", name)
        assert ended.returncode == 0, ended.stderr
    assert "src/renamed_again/houses/model.py" in python(project, "scripts/new.py", "houses").stdout
    tests = [f"tests/renamed_again/test_{name}.py" for name in ("houses", "regression_data")]
    ended = python(project, "-m", "pytest", "-q", *tests)
    assert ended.returncode == 0, ended.stdout
