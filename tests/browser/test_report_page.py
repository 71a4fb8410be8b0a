"""The sweep's page, opened from disk as a person does."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import RATES

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


def column(browser: "Chrome", name: str) -> list[str]:
    heads = [head.text.rstrip(" ↑↓") for head in browser.find_elements("css selector", "thead th")]
    return [cell.text for cell in browser.find_elements("css selector", f"tbody td:nth-child({heads.index(name) + 1})")]


def test_the_page_opens_from_disk_and_shows_the_rates(browser: "Chrome", sweep: Path) -> None:
    for log in ("performance", "browser"):
        browser.get_log(log)  # what other tests left
    browser.get((sweep / "report.html").as_uri())
    assert browser.title == "Sweep rates"
    assert sorted(column(browser, "lr")) == list(RATES)
    assert dict(zip(column(browser, "lr"), column(browser, "status"), strict=True))["0.4"] == "diverged"
    assert "scripts/train.py lr=0.1 data.batch_size=1000" in " ".join(column(browser, "again"))
    widths = [browser.execute_script("return arguments[0].naturalWidth", each)  # type: ignore[no-untyped-call]
              for each in browser.find_elements("css selector", "img")]  # fmt: skip
    assert len(widths) == 2
    assert min(widths) > 500
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        each["params"]["request"]["url"].partition(":")[0]
        for each in sent
        if each["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {"file", "data"}


def test_a_click_on_a_column_sorts_by_its_numbers(browser: "Chrome", sweep: Path) -> None:
    browser.get((sweep / "report.html").as_uri())
    button = next(each for each in browser.find_elements("css selector", "th button") if each.text.startswith("lr"))
    button.click()
    assert column(browser, "lr") == list(RATES)
    button.click()
    assert column(browser, "lr") == list(reversed(RATES))
