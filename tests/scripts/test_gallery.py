import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gallery import MISTAKES, RATES, SHARES, bowl, svg
from PIL import Image

from tests.conftest import ROOT


def test_every_experiment_that_teaches_is_shown() -> None:
    others = {"digits", "learning_rate_sweep", "learning_rate_and_device_sweep", "optuna_search"}
    assert {*RATES, *MISTAKES} == {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")} - others


def test_a_curve_spans_its_axes_from_the_greatest_value_to_the_least() -> None:
    drawn = svg([(0, 100.0), (5, 10.0), (10, 1.0)])
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="(.*?)"', drawn)[0].split()]
    assert [y for _, y in points] == pytest.approx([8, 91, 174])  # equal ratios are equal ways down
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)


def test_the_animated_rates_creep_arrive_and_run_away() -> None:
    hessian, optimum = bowl()
    edge = 2 / torch.linalg.eigvalsh(hessian)[-1]
    error = torch.tensor([-0.75, 0.95], dtype=torch.float64)
    left = {
        name: float(
            (torch.linalg.matrix_power(torch.eye(2) - share * edge * hessian, 48) @ error).norm() / error.norm()
        )
        for name, share in SHARES.items()
    }
    assert left["right"] < 1e-3 < 0.1 < left["too small"] < 1 < left["too large"]
    assert optimum.isfinite().all()


@pytest.mark.slow
def test_the_page_shows_what_a_run_said(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/laboratory/gallery.py"), "--folder", str(tmp_path)]
    subprocess.run([*command, "--only", "diverge", "detached_graph"], check=True, capture_output=True)
    page = (tmp_path / "index.html").read_text()
    assert "python scripts/train.py experiment=diverge" in page
    assert ">too_large<" in page
    assert ">stalled<" in page
    assert page.count("<polyline") == 3  # a detached loss has a curve, and no gradient
    with Image.open(tmp_path / "descent.gif") as animation:
        assert animation.n_frames > 40
