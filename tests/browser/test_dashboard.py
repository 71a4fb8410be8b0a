"""TensorBoard over a real sweep: the tabs show the rates."""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import RATES
from tests.conftest import ROOT, read_json

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# TensorBoard's tabs nest shadow roots, which `document.body.innerText` leaves out, and one of them is an <iframe>.
TEXT = """
const text = node => node.nodeType === 3 ? node.data + " " : ["STYLE", "SCRIPT"].includes(node.nodeName) ? "" :
  [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(text).join("");
return text(document.body);
"""


def wait_for(browser: "Chrome", *words: str, seconds: float = 20) -> str:
    text, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        text = browser.execute_script(TEXT)  # type: ignore[no-untyped-call]
        if all(word in text for word in words):
            return text
        time.sleep(0.2)
    raise AssertionError(f"{[word for word in words if word not in text]} not among: {' '.join(text.split())[:3000]}")


@pytest.mark.parametrize("tab", ["timeseries", "scalars", "custom_scalars"])
def test_the_runs_are_named_by_their_rates(browser: "Chrome", dashboard: str, tab: str) -> None:
    browser.get("about:blank")
    browser.get(f"{dashboard}/#{tab}")
    cards = (
        ["Gradients", "Learning-rate effects"] if tab == "custom_scalars" else ["gradient_norm", "learning_rate_effect"]
    )
    wait_for(browser, *cards, *(f"lr={rate}" for rate in RATES))


FIRST = {  # what the first screen of a tab begins with
    "timeseries": "Loss log10_train log10_val gradient_norm",
    "scalars": "Loss log10_train log10_val gradient_norm",
    "custom_scalars": "Loss log₁₀ other metrics",
    "text": "verdict converged",
    "images": "pictures loss_surface",
    "hparams": "too_slow too_large",
}


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("tab", FIRST)
def test_the_first_screen_of_a_tab_has_the_loss_or_the_verdict(
    browser: "Chrome", dashboard_of_five: str, tab: str, mode: str, tmp_path: Path
) -> None:
    """The screenshots are for people: DOWNSLOPE_SCREENSHOTS names the folder that keeps them."""
    browser.get("about:blank")
    browser.get(f"{dashboard_of_five}/?darkMode={str(mode == 'dark').lower()}#{tab}")
    text = " ".join(wait_for(browser, *FIRST[tab].split(), seconds=90).split())
    folder = Path(os.environ.get("DOWNSLOPE_SCREENSHOTS", tmp_path))
    time.sleep(1)  # for the curves to be drawn
    assert browser.save_screenshot(str(folder / f"{tab}_{mode}.png"))
    if tab in ("timeseries", "scalars"):
        assert text.index("log10_train") < text.index("gradient_norm")


def test_hparams_shows_rates_choices_metrics_and_verdicts(browser: "Chrome", dashboard: str, sweep: Path) -> None:
    verdicts = {read_json(job.parent)["verdict"] for job in sweep.glob("*/result.json")}
    assert "too_large" in verdicts
    browser.get("about:blank")
    browser.get(f"{dashboard}/#hparams")
    text = wait_for(browser, "val/loss", "excess_loss", "verdict", *verdicts, "automatic", "sgd", "data")
    assert all(float(rate) in numbers(text) for rate in RATES), text


def numbers(text: str) -> set[float]:
    found = set()
    for word in text.split():
        try:
            found.add(float(word))
        except ValueError:
            continue
    return found


def test_the_first_screen_is_the_loss_and_the_gradient_norm(browser: "Chrome", dashboard: str) -> None:
    recipe = subprocess.run(["make", "-n", "dashboard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pinned = re.search(r"http://127\.0\.0\.1:6006(\S+%5D)", recipe)
    assert pinned, recipe
    browser.get("about:blank")
    browser.get(dashboard + pinned[1])
    text = wait_for(browser, "3 cards", "train /loss", "val /loss")  # as its elements cut the names
    assert text.index("3 cards") < text.index("train /loss") < text.index("val /loss")


def test_the_verdict_stands_above_the_configuration(browser: "Chrome", dashboard: str) -> None:
    browser.get("about:blank")
    browser.get(f"{dashboard}/#text")
    text = wait_for(browser, "verdict", "yaml/configuration")
    assert text.index("verdict") < text.index("yaml/configuration")


def test_the_configuration_is_there_as_text(browser: "Chrome", dashboard: str) -> None:
    browser.get("about:blank")
    browser.get(f"{dashboard}/#text")
    wait_for(browser, "configuration", "batch_size: 1000", "lr: 0.1")
