"""A job of a sweep finds the process as the first one found it, whatever ran before."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from downslope.steps.random_state import random_state


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Puts back what a job may have changed for the whole process."""
    environment, folder, threads = dict(os.environ), Path.cwd(), torch.get_num_threads()
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    anomaly, gradients = torch.is_anomaly_enabled(), torch.is_grad_enabled()
    try:
        with random_state(), warnings.catch_warnings():
            try:
                yield
            finally:
                logging.captureWarnings(False)  # or logging believes that it still does, and the next job's show
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.set_grad_enabled(gradients)
