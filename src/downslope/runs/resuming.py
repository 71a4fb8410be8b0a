"""A run is resumed in its own folder, with its own configuration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from downslope.runs.configuration import show
from downslope.runs.plain_files import check_regular
from downslope.runs.result import Result, read_result
from downslope.runs.trust import check_local, read_untrusted
from downslope.runs.whole_files import whole_file

OWN_KEYS = ("resume", "resume_override", "trust")
FIXED = ("data", "seed", "experiment")  # another order of rows, or other rows: nothing that could be resumed


def load_run_configuration(config: DictConfig, trusted: Sequence[str]) -> Result | None:
    """Makes the composed configuration that of the run named by `resume`, whatever `conf/` holds today.

    What was typed beside `resume` is held against it: a value that differs must be named in `resume_override`, too.

    Args:
        config: As composed, with Hydra's own node; changed in place.
        trusted: What the run's configuration may name beside what this command's does.

    Returns:
        The run's result, where nothing is left to be done.

    Raises:
        ValueError: The folder is not a run's, or a value differs from the run's own.
    """
    check_local(config.resume, "resume")
    run = Path(os.path.abspath(str(config.resume)))  # noqa: PTH100  # resolve() would follow the links that are refused
    check_regular(run)
    saved = read_untrusted(_file(run, "config.yaml"), trusted)
    hydra = read_untrusted(_file(run, "hydra.yaml"), only=("hydra.overrides.task", "hydra.runtime.choices")).hydra
    typed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    typed = [override for override in typed if not override.key_or_group.startswith(("hydra.", *OWN_KEYS))]
    allowed = list(config.resume_override or [])
    for key in allowed:
        if key not in [override.key_or_group for override in typed]:
            raise ValueError(
                f"`resume_override` must name keys that the same command sets, got {key!r} without {key}=…."
            )
    changed = [override for override in typed if _change(override, config, saved, hydra, allowed)]
    kept = [each for each in hydra.overrides.task if not _sets(each, changed)]
    with read_write(config), open_dict(config):
        for key in [str(key) for key in config if key != "hydra"]:
            del config[key]
        for key in saved:
            config[key] = saved._get_node(key)
        config.resume, config.resume_override = str(run), allowed
        config.hydra.run.dir = str(run)
        config.hydra.output_subdir = None  # what stands there is the run's own
        config.hydra.overrides.task = [*kept, *(override.input_line for override in changed)]
        config.hydra.runtime.choices = hydra.runtime.choices
    result = read_result(run)
    return result if result and result.status in ("completed", "diverged") and not changed else None


def keep_changes(config: DictConfig, now: HydraConf) -> None:
    """Writes what `resume_override` changed into the run's configuration: the next resume takes it from there."""
    if not config.get("resume_override"):
        return
    own = config.copy()
    with read_write(own), open_dict(own):
        own.resume, own.resume_override = None, []
    hydra = OmegaConf.load(_file(Path(config.resume), "hydra.yaml"))
    hydra.hydra.overrides.task = now.overrides.task
    hydra.hydra.runtime.choices = now.runtime.choices
    for name, content in {"config": own, "overrides": now.overrides.task, "hydra": hydra}.items():
        with whole_file(Path(config.resume) / ".hydra" / f"{name}.yaml") as stream:
            stream.write(OmegaConf.to_yaml(content).encode())


def _sets(text: str, overrides: Sequence[Override]) -> bool:
    """Tells whether what was typed once sets a key of these."""
    return text.partition("=")[0].lstrip("+") in [override.key_or_group for override in overrides]


def _file(run: Path, name: str) -> Path:
    file = run / ".hydra" / name
    if not file.is_file():
        raise ValueError(
            f"`resume` must be the folder of a run, outputs/runs/…, got {str(run)!r}: it has no .hydra/{name}."
        )
    return file


def _change(override: Override, config: DictConfig, saved: DictConfig, hydra: DictConfig, allowed: list[str]) -> bool:
    """Takes a typed value over into the saved configuration, and tells whether it is another one."""
    key = override.key_or_group
    is_group = bool(GlobalHydra.instance().config_loader().get_group_options(key))
    old = hydra.runtime.choices.get(key) if is_group else OmegaConf.select(saved, key)
    new = config.hydra.runtime.choices.get(key) if is_group else OmegaConf.select(config, key)
    if old == new and not override.is_delete():
        return False
    values = f"{key} is {_words(old)} in the run, got {_words(new)}"
    if key.split(".")[0] in FIXED or override.is_delete():
        raise ValueError(
            f"Cannot change `{key}` of a run that is resumed: {values}. This is because it would be "
            f"a different run: leave {key} out, or start a new run without resume=."
        )
    if key not in allowed:
        raise ValueError(
            f"`resume` continues with the run's own configuration: {values}. To change it from here on: "
            f"resume_override=[{key}] {override.input_line}."
        )
    OmegaConf.update(saved, key, config[key] if is_group else new, merge=False, force_add=True)
    if is_group:
        hydra.runtime.choices[key] = new
    return True


def _words(value: Any) -> str:
    return value if isinstance(value, str) else show(value)
