"""The gate before every run: a configuration that cannot run is refused before anything is written."""

import contextlib
import gc
import logging
import os
import re
import secrets
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from downslope.launch.configuration import check_additions, check_nodes, check_values
from downslope.runs.command_line import typed
from downslope.runs.console import explain, refusing, say
from downslope.runs.result import EXIT_CODES, read_result
from downslope.runs.resuming import adopt, checkpoint_of, keep_changes
from downslope.sweeps.ending import BASIC, Ending
from downslope.sweeps.grid import MISSING, missing_jobs, typed_overrides, values
from downslope.sweeps.job import job_name

DECIMAL_COMMA = re.compile(r"=\d+,\d+(\s|$)")


def run_name() -> str:
    """Returns date, time and four characters: two runs of one second never share a folder."""
    letters = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(4))
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{letters}"


def name_of_the_job(*, _root_: DictConfig) -> str:
    """Returns the name of a job's folder, by its overrides as typed: an interpolation in one has no value before it."""
    hydra: Any = OmegaConf.to_container(_root_.hydra.job, resolve=False)
    return job_name(hydra["override_dirname"])


OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("job_name", name_of_the_job, replace=True)


class Gate(Callback):
    """Hydra's callback: checks before the folder is made, and lets the exit code tell the truth.

    Hydra swallows every `Exception` of a callback, so that a refusal leaves by `SystemExit`.
    """

    sweep: Ending | None = None  # the one that runs: on an interruption Hydra leaves without `on_multirun_end`

    def on_run_start(self, config: DictConfig, config_name: str = "", **kwargs: Any) -> None:
        """Refuses a single run."""
        with refusing(config_name):
            ended = adopt(config) if config.get("resume") else None
            folder = Path(config.hydra.run.dir).absolute()
            if ended:
                say(
                    f"{config.resume} has ended at step {ended.num_optimizer_steps:,}, {ended.status}: "
                    "there is nothing to go on with."
                )
                say("More epochs: resume_override=[trainer.max_epochs] trainer.max_epochs=…")
                raise SystemExit(EXIT_CODES[ended.status])
            check_folder(folder, "hydra.run.dir")
            check(config.copy(), folder)
            if config.get("resume"):
                keep_changes(config)

    def on_multirun_start(self, config: DictConfig, config_name: str = "", **kwargs: Any) -> None:
        """Refuses a sweep if one of its values is impossible, whatever the others are."""
        with refusing(config_name):
            if config.get("resume"):
                raise ValueError(
                    "`resume` goes on with one run, got it with -m. A sweep: hydra.sweep.dir=<its folder>."
                )
            folder = Path(config.hydra.sweep.dir).absolute()
            check_folder(folder, "hydra.sweep.dir")
            anything_to_run = config.hydra.sweeper._target_ != MISSING or missing_jobs(config)
            if anything_to_run:
                check_sweep(config, config_name, folder)
        with open_dict(config), read_write(config):
            Gate.sweep = Ending(config)
            if anything_to_run and config.hydra.launcher._target_ != BASIC:
                Gate.sweep.listen(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Lets go of the job's configuration: the launcher keeps what a job returns until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leaves with exit code 1 where a job has failed."""
        sweep, Gate.sweep = Gate.sweep, None
        if sweep:
            sweep.finish()

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leaves with the exit code of the run's status."""
        result = read_result(Path(config.hydra.runtime.output_dir))
        if result and result.status == "diverged":
            raise SystemExit(EXIT_CODES[result.status])


def check_sweep(config: DictConfig, config_name: str, folder: Path) -> None:
    """Raises where one of a sweep's values would stop its job, whatever the others are."""
    for variant, overrides in variants(config, config_name):
        try:
            check(variant, folder, devices=False)
        except Exception as error:
            hint = " Decimals are written with a point." if DECIMAL_COMMA.search(overrides) else ""
            raise ValueError(f"{explain(error)} (in the sweep over {overrides}){hint}") from error


def check(config: DictConfig, folder: Path, devices: bool = True) -> None:
    """Raises for whatever would stop the run: the check of its parts is to build them.

    Args:
        config: As composed, with Hydra's own node; changed in place.
        folder: Where the run would write.
        devices: Whether a device that is not there counts; a sweep goes on without the jobs that need it.
    """
    check_values(config)
    overrides = OverridesParser.create().parse_overrides(typed(config.hydra.overrides.task))
    loader = GlobalHydra.instance().config_loader()
    check_additions(config, overrides, groups=lambda name: bool(loader.get_group_options(name)))
    with read_write(config), open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
    with _heavy_imports(), _hydra_config(config):
        from template.train import build

        if not devices:
            OmegaConf.to_container(config.trainer, resolve=True)  # is there one, for whatever device?
            with read_write(config), open_dict(config):
                config.device = {"accelerator": "cpu", "devices": 1}
        check_nodes(config)
        datamodule, module, _ = build(config)
        datamodule.setup("fit")  # are its numbers too large for float32?
        if config.get("resume"):
            checkpoint_of(Path(config.resume), datamodule, module)


@contextlib.contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    """Resolves `${hydra:…}` by a configuration, which Hydra itself does only inside a job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


@contextlib.contextmanager
def _heavy_imports() -> Iterator[None]:
    """Imports torch and Lightning without the garbage collector, which would walk every object they make.

    Only the first time: freezing again would keep for ever whatever garbage an earlier run in this process has left.

    Logging is not configured yet: what they have to say now would land in the terminal.
    """
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _import_torchmetrics()
            yield
    finally:
        logging.disable(logging.NOTSET)
        if first:
            gc.freeze()
            gc.enable()


def _import_torchmetrics() -> None:
    """Imports torchmetrics without matplotlib, which it loads for `Metric.plot` wherever it is installed: 0.5 s.

    It asks Lightning's `RequirementCache`, which answers no while torchmetrics is imported, and for that one object
    from then on: else `plot` would look for what was never imported.
    """
    from lightning_utilities.core.imports import RequirementCache

    check = RequirementCache._check_available

    def pretend(cache: RequirementCache) -> None:
        if cache.requirement == "matplotlib":
            cache.available, cache.message = False, "matplotlib is left out of the start-up"
        check(cache)

    with patch.object(RequirementCache, "_check_available", pretend):
        import torchmetrics  # noqa: F401


def check_folder(folder: Path, key: str) -> None:
    """Raises where a folder could not be made or written."""
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise ValueError(f"`{key}` must be a folder that can be written, got {str(folder)!r}: {parent} {what}.")


def variants(config: DictConfig, config_name: str) -> Iterator[tuple[DictConfig, str]]:
    """Yields configurations that show each value of a sweep once, not each combination, with what was typed.

    Args:
        config: As Hydra's multirun has it: the swept keys still at their defaults.
        config_name: The primary configuration's name.
    """
    parser, loader = OverridesParser.create(), GlobalHydra.instance().config_loader()
    overrides = typed_overrides(config)
    choices = [values(override) for override in overrides]
    first = [each[0] for each in choices]
    base = compose(config_name, first, return_hydra_config=True)
    yield base.copy(), " ".join(override.input_line or "" for override in overrides)
    for index, override in enumerate(overrides):
        is_group = len(choices[index]) > 1 and bool(loader.get_group_options(override.key_or_group))
        for choice in choices[index][1:]:
            if is_group:
                others = [*first[:index], choice, *first[index + 1 :]]
                variant = compose(config_name, others, return_hydra_config=True)
            else:  # a thousand learning rates are checked in the time that a dozen are composed in
                variant = base.copy()
                value = parser.parse_override(choice).value()
                OmegaConf.update(variant, override.key_or_group, value, merge=False, force_add=True)
            yield variant, override.input_line or ""
