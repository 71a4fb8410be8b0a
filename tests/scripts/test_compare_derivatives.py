import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from derivatives import best_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_derivatives.py"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    specification = importlib.util.spec_from_file_location("compare_derivatives", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["compare_derivatives"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(compare: ModuleType) -> dict[tuple[str, int], object]:
    compare.measure(1)  # SymPy and torch load their formulas
    return {(each.method, size): each for size in (1, 10, 300) for each in compare.measure(size)}


def test_formulas_are_exact_to_float32_and_differences_to_half_of_it(measured) -> None:
    for (method, size), each in measured.items():
        if method == "numeric":
            assert each.error < 1e-3, size  # ε^(2/3) = 2e-5, times the loss over the gradient's norm
        else:
            assert each.error < 1e-6, (method, size)  # ε = 1.2e-7, a few times
    assert measured["numeric", 300].error > 5 * measured["reverse mode", 300].error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_valley_lies_at_the_third_root_of_epsilon(compare: ModuleType, dtype: torch.dtype) -> None:
    valley = compare.valley(dtype)
    step, error = valley.best
    assert best_step(dtype) / 10 < step < best_step(dtype) * 10
    assert valley.chosen[1] < 10 * error
    assert valley.errors[0] > 1e3 * error
    assert valley.errors[-1] > 1e3 * error
    assert all(error == error for error in valley.errors)  # no NaN


@pytest.mark.slow
def test_script_prints_and_draws(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--output", tmp_path / "new"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # what newer versions of torch say of torch's own code
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "(2/N)*Z.T*(Z*θ - y)" in run.stdout
    assert (tmp_path / "new" / "derivatives.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "new")).Reload()
    assert events.Tags()["images"] == ["derivatives"]
