"""The gate before every run: a configuration that cannot run is refused before anything is written."""

import gc
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from downslope.launch.checks import check_additions, check_nodes, check_settings, check_values
from downslope.runs.command_line import typed
from downslope.runs.configuration import hydra_config
from downslope.runs.console import explain, refusing, say, shortest
from downslope.runs.folder import check_unused, is_main_process, lock
from downslope.runs.log import early_log, forget_early_log, hear_lightning
from downslope.runs.plain_files import check_regular
from downslope.runs.prepared import keep
from downslope.runs.result import EXIT_CODES, read_result
from downslope.runs.resuming import load_run_configuration
from downslope.runs.trust import check_inside, names_in
from downslope.sweeps.ending import IN_THIS_PROCESS, VECTORIZED, Ending
from downslope.sweeps.grid import MISSING, missing_jobs, typed_overrides, values
from downslope.sweeps.job import ODD, job_name

LONGEST_CHOICE = 80
DECIMAL_COMMA = re.compile(r"=\d+,\d+(\s|$)")


def run_name() -> str:
    """Returns date, time and four characters: two runs of one second never share a folder."""
    letters = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(4))
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{letters}"


def chosen(*, _root_: DictConfig) -> str:
    """Returns what was chosen or overridden, to tell runs apart by: the end of a folder's name."""
    return _ending(_typed_overrides(_root_))


def swept() -> str:
    """Returns a sweep's experiment, and which keys were typed with several values; its jobs take it from there."""
    overrides = get_args_parser().parse_known_args(sys.argv[1:])[0].overrides
    words = []
    for key, _, value in (each.partition("=") for each in overrides if not each.startswith("hydra")):
        if set(",(") & set(value):
            words.append(key)
        elif key == "experiment":
            words.append(value)
    return _ending(",".join(words))


def _ending(overrides: str) -> str:
    words = ODD.sub("-", overrides.replace("experiment=", ""))[:LONGEST_CHOICE].strip("-,.")
    return f"_{words}" if words else ""


def name_of_the_job(*, _root_: DictConfig) -> str:
    """Returns the name of a job's folder, by its overrides as typed: an interpolation in one has no value before it."""
    return job_name(_typed_overrides(_root_))


def _typed_overrides(config: DictConfig) -> str:
    hydra: Any = OmegaConf.to_container(config.hydra.job, resolve=False)
    overrides: str = hydra["override_dirname"]
    return overrides


OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("chosen", chosen, replace=True)
OmegaConf.register_new_resolver("swept", swept, use_cache=True, replace=True)
OmegaConf.register_new_resolver("job_name", name_of_the_job, replace=True)


class Gate(Callback):
    """Hydra's callback: checks before the folder is made, and lets the exit code tell the truth.

    Hydra swallows every `Exception` of a callback, so that a refusal leaves by `SystemExit`.

    Args:
        build: Full name of the function that makes data, module and Trainer out of a configuration.
    """

    sweep: Ending | None = None  # the one that runs: on an interruption Hydra leaves without `on_multirun_end`

    held: FileLock | None = None  # of the single run's folder

    def __init__(self, build: str) -> None:
        self.build = build

    def on_run_start(self, config: DictConfig, config_name: str = "", **kwargs: Any) -> None:
        """Refuses a single run."""
        with refusing(config_name):
            trusted = [*config.get("trust", ()), *names_in(config)]
            ended = load_run_configuration(config, trusted) if config.get("resume") else None
            if ended:
                step = f"{ended.num_optimizer_steps:,}, {ended.status}"
                say(f"{shortest(Path(config.resume))} ended at step {step}: there is nothing left to do.")
                if ended.status == "diverged":
                    say("To try a smaller lr, start a new run: the same command without resume=.")
                else:
                    say("To train for more epochs: resume_override=[trainer.max_epochs] trainer.max_epochs=…")
                raise SystemExit(EXIT_CODES[ended.status])
            if config.hydra.launcher._target_ == VECTORIZED:
                raise ValueError(
                    "`hydra/launcher=vectorized` trains the jobs of a sweep at once, but this is a single run: add -m."
                )
            folder = _writable(config.hydra.run.dir, "hydra.run.dir")
            writes, resumes = is_main_process(), bool(config.get("resume"))
            if writes and resumes:
                Gate.held = lock(folder)  # nobody changes what is read from here on
            elif writes:
                check_unused(folder)
            _check(config.copy(), folder, self.build, trusted)
            if writes and not resumes:
                Gate.held = lock(folder)

    @classmethod
    def let_go(cls) -> None:
        """Opens the run's folder to other processes."""
        if cls.held:
            cls.held.release()
            cls.held = None

    def on_multirun_start(self, config: DictConfig, config_name: str = "", **kwargs: Any) -> None:
        """Refuses a sweep if one of its values is impossible, whatever the others are."""
        with refusing(config_name):
            if config.get("resume"):
                raise ValueError(
                    "`resume` continues a single run and cannot be combined with -m. "
                    "To continue a sweep: hydra.sweep.dir=<its folder>."
                )
            folder = _writable(config.hydra.sweep.dir, "hydra.sweep.dir")
            for each in folder.iterdir() if folder.is_dir() else ():
                if each.is_symlink() or not each.is_dir():  # a job's folder is checked in its turn
                    check_regular(each)
            anything_to_run = config.hydra.sweeper._target_ != MISSING or missing_jobs(config)
            if anything_to_run:
                self._check_sweep(config, config_name, folder)
        with open_dict(config), read_write(config):
            Gate.sweep = Ending(config)
            if anything_to_run and config.hydra.launcher._target_ not in IN_THIS_PROCESS:
                Gate.sweep.listen(config)

    def _check_sweep(self, config: DictConfig, config_name: str, folder: Path) -> None:
        for variant, overrides, must_be_built in _variants(config, config_name):
            try:
                if must_be_built:
                    _check(variant, folder, self.build, in_sweep=True)
                else:
                    check_settings(variant)
            except Exception as error:
                hint = " Decimals are written with a point." if DECIMAL_COMMA.search(overrides) else ""
                raise ValueError(f"{explain(error)} (in the sweep over {overrides}){hint}") from error
        forget_early_log()

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


def _check(config: DictConfig, folder: Path, build: str, trusted: Sequence[str] = (), in_sweep: bool = False) -> None:
    """Raises for whatever would stop the run: the check of its parts is to build them, and a run takes these.

    A sweep goes on without the jobs that need a device that is not there.
    """
    check_values(config)
    overrides = OverridesParser.create().parse_overrides(typed(config.hydra.overrides.task))
    loader = GlobalHydra.instance().config_loader()
    check_additions(config, overrides, groups=lambda name: bool(loader.get_group_options(name)))
    with read_write(config), open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
    with hydra_config(config), early_log():
        is_first = "torch" not in sys.modules
        if is_first:  # nothing of what these imports make is garbage, and it would be searched again and again
            gc.disable()
        from downslope.launch import parts
        from downslope.runs.checkpoints import checkpoint_of

        make = get_method(build)
        if is_first:
            gc.freeze()
            gc.enable()
        hear_lightning()
        if in_sweep:
            OmegaConf.to_container(config.trainer, resolve=True)  # is there a device, whichever?
            with read_write(config), open_dict(config):
                config.device = {"accelerator": "cpu", "devices": 1}
        if config.get("resume"):
            check_inside(config, folder, trusted)
        check_nodes(config)
        parts.check_optimizer(config)
        built = data, module, _ = make(config)
        things: dict[str, Any] = {"parts": built}
        if config.get("resume"):
            things["checkpoint"] = checkpoint_of(Path(config.resume), data, module)
        keep(**({} if in_sweep else things))


def _writable(path: str, key: str) -> Path:
    """The absolute folder; raises where it could not be made or written."""
    folder = Path(path).absolute()
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        what = "is not writable" if parent.is_dir() else "is not a folder"
        raise ValueError(f"`{key}` must be a folder that can be written, got {str(folder)!r}: {parent} {what}.")
    return folder


def _variants(config: DictConfig, config_name: str) -> Iterator[tuple[DictConfig, str, bool]]:
    """Configurations that show each value of a sweep once, not each combination: what was typed, and must it be built?

    Of an interval its ends are shown. A number that the optimizer alone is set to builds nothing else: a thousand are
    checked while twenty are built.
    """
    parser, loader = OverridesParser.create(), GlobalHydra.instance().config_loader()
    overrides = typed_overrides(config)
    choices = [values(override, config.hydra.sweeper.get("points")) for override in overrides]
    first = [each[0] for each in choices]
    base = compose(config_name, first, return_hydra_config=True)
    yield base.copy(), " ".join(override.input_line or "" for override in overrides), True
    for index, override in enumerate(overrides):
        key, variant = override.key_or_group, base.copy()
        is_group = len(choices[index]) > 1 and bool(loader.get_group_options(key))
        is_setting = key == "lr" or key.startswith("optimizer.")
        rest = choices[index][1:]
        for choice in rest[-1:] if override.is_interval_sweep() else rest:  # what a number may be is a range
            if is_group:
                others = [*first[:index], choice, *first[index + 1 :]]
                variant = compose(config_name, others, return_hydra_config=True)
            else:
                variant = variant if is_setting else base.copy()
                value = parser.parse_override(choice).value()
                OmegaConf.update(variant, key, value, merge=False, force_add=True)
            yield variant, override.input_line or "", not is_setting
