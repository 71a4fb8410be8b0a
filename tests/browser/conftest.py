"""A headless Chromium, and a real sweep for it to look at."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import run_process

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1400,1000",
)  # fmt: skip
RATES = ("0.003", "0.1", "0.4")


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Chrome]":
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no browser: chromium and chromedriver are not on the PATH (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="package")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rates of full batches, one of them above 2/λ."""
    folder = tmp_path_factory.mktemp("project")
    ended = run_process(
        folder, "train", "-m", f"lr={','.join(RATES)}", "data.batch_size=1000", "trainer.max_epochs=60",
        "callbacks.gradient_monitor.every_n_steps=5", "hydra.sweep.dir=outputs/sweeps/rates",
    )  # fmt: skip
    assert (folder / "outputs/sweeps/rates/report.html").is_file(), ended.stderr
    return folder / "outputs" / "sweeps" / "rates"


@pytest.fixture(scope="package")
def dashboard(sweep: Path) -> Iterator[str]:
    """TensorBoard over the sweep."""
    with served(sweep, len(RATES)) as address:
        yield address


@pytest.fixture(scope="package")
def dashboard_of_five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard over five runs: sound, slow, diverged, another task, and a sweep."""
    folder = tmp_path_factory.mktemp("five")
    for arguments in ([], ["experiment=too_slow"], ["experiment=diverge"], ["experiment=digits"]):
        assert run_process(folder, "train", *arguments).returncode in (0, 3)
    assert run_process(folder, "train", "-m", "lr=0.005,0.02,0.2", "trainer.max_epochs=40").returncode == 0
    with served(folder / "outputs", 7) as address:
        yield address


@contextlib.contextmanager
def served(folder: Path, num_runs: int) -> Iterator[str]:
    """Serves TensorBoard as `make dashboard` does, on a port that is free, until it has found the runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *where]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{address}/data/runs") as answer:
                    if len(json.load(answer)) >= num_runs:
                        break
            except OSError:
                pass
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()
