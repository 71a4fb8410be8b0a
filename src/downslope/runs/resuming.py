"""Going on with a run in its own folder: with its own configuration, from its newest whole checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from downslope.runs.configuration import show
from downslope.runs.result import Result, read_result
from downslope.runs.trust import check_local, names_in, read_untrusted
from downslope.runs.whole_files import whole_file

if TYPE_CHECKING:
    from lightning import LightningModule

OWN_KEYS = ("resume", "resume_override", "trust")
FIXED = ("data", "seed")  # another order of rows, or other rows: nothing that could be gone on with


def adopt(config: DictConfig) -> Result | None:
    """Makes the composed configuration that of the run named by `resume`, whatever `conf/` holds today.

    What was typed beside `resume` is held against it: a value that differs must be named in `resume_override`, too.

    Args:
        config: As composed, with Hydra's own node; changed in place.

    Returns:
        The run's result, where nothing is left to be done.

    Raises:
        ValueError: The folder is not a run's, or a value differs from the run's own.
    """
    run = Path(str(config.resume)).absolute()
    check_local(config.resume, "resume")
    saved = read_untrusted(_file(run, "config.yaml"), [*config.trust, *names_in(config)])
    hydra = read_untrusted(_file(run, "hydra.yaml"), only=("hydra.overrides.task", "hydra.runtime.choices")).hydra
    typed = [override for override in _typed(config) if not override.key_or_group.startswith(("hydra.", *OWN_KEYS))]
    allowed = list(config.resume_override or [])
    keys = [override.key_or_group for override in typed]
    for key in allowed:
        if key not in keys:
            raise ValueError(f"`resume_override` must name keys that are set beside it, got {key!r} without {key}=….")
    changed = [override for override in typed if _change(override, config, saved, hydra, allowed)]
    result = read_result(run)
    ended = result is not None and result.status in ("completed", "diverged")
    with read_write(config), open_dict(config):
        for key in [str(key) for key in config if key != "hydra"]:
            del config[key]
        for key in saved:
            config[key] = saved._get_node(key)
        config.resume, config.resume_override = str(run), allowed
        config.hydra.run.dir = str(run)
        config.hydra.output_subdir = None  # what stands there is the run's own
        config.hydra.overrides.task = [*hydra.overrides.task, *(override.input_line for override in changed)]
        config.hydra.runtime.choices = hydra.runtime.choices
    return result if ended and not changed else None


def keep_changes(config: DictConfig) -> None:
    """Writes what `resume_override` changed into the run's configuration: the next resume takes it from there."""
    if not config.resume_override or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    folder = Path(config.resume) / ".hydra"
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    with open_dict(own):
        own.resume, own.resume_override = None, []
    hydra = OmegaConf.load(_file(Path(config.resume), "hydra.yaml"))
    hydra.hydra.overrides.task = config.hydra.overrides.task
    hydra.hydra.runtime.choices = config.hydra.runtime.choices
    for name, content in {"config": own, "overrides": config.hydra.overrides.task, "hydra": hydra}.items():
        with whole_file(folder / f"{name}.yaml") as stream:
            stream.write(OmegaConf.to_yaml(content).encode())


def _file(run: Path, name: str) -> Path:
    file = run / ".hydra" / name
    if not file.is_file():
        raise ValueError(
            f"`resume` must be the folder of a run, outputs/runs/…, got {str(run)!r}: it has no .hydra/{name}."
        )
    return file


def _typed(config: DictConfig) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))


def _change(override: Override, config: DictConfig, saved: DictConfig, hydra: DictConfig, allowed: list[str]) -> bool:
    """Takes a typed value over into the saved configuration, and tells whether it is another one."""
    key = override.key_or_group
    group = bool(GlobalHydra.instance().config_loader().get_group_options(key))
    old = hydra.runtime.choices.get(key) if group else OmegaConf.select(saved, key)
    new = config.hydra.runtime.choices.get(key) if group else OmegaConf.select(config, key)
    if old == new and not override.is_delete():
        return False
    values = f"{key} is {_words(old)} in the run, got {_words(new)}"
    if key.split(".")[0] in FIXED or key == "experiment" or override.is_delete():
        raise ValueError(
            f"Cannot change `{key}` of a run that is gone on with: {values}. This is because it would be "
            f"another run: leave {key} out, or start one of its own without resume=."
        )
    if key not in allowed:
        raise ValueError(
            f"`resume` goes on with the run's own configuration: {values}. To change it from here on: "
            f"resume_override=[{key}] {override.input_line}."
        )
    OmegaConf.update(saved, key, config[key] if group else new, merge=False, force_add=True)
    if group:
        hydra.runtime.choices[key] = new
    return True


def _words(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


_kept: dict[Path, tuple[Path, dict[str, Any]]] = {}  # what the gate has read and checked, for the run itself


def checkpoint_of(
    run: Path, data: object, module: "LightningModule", keep: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint to go on from, if it is one of this model and of these data.

    Args:
        run: Its folder.
        data: That it would go on with.
        module: That it would go on with.
        keep: For the next call: read and checked once.

    Raises:
        ValueError: There is none that is whole, or it is of something else; the message names both.
    """
    from downslope.runs.checkpoints import newest_checkpoint

    if run in _kept:
        return _kept.pop(run)
    file, checkpoint = newest_checkpoint(run)
    progress = checkpoint["progress"]
    check_same(file, "model", progress["model"], name_of(module))
    check_same(file, "set of weights", _shapes(checkpoint["state_dict"]), _shapes(module.state_dict()))
    check_same(file, "set of data", progress["data"], fingerprint(data))
    if keep:
        _kept[run] = file, checkpoint
    return file, checkpoint


def check_same(file: object, what: str, saved: Any, here: Any) -> None:
    """Refuses a checkpoint that was made with something else.

    Raises:
        ValueError: Both are named.
    """
    if saved != here:
        raise ValueError(
            f"Cannot go on from {file}. This is because it was made with another {what}: {_list(saved)} there, "
            f"{_list(here)} here."
        )


def fingerprint(data: object) -> str | None:
    """Returns what a datamodule says of the numbers that it serves, None where it says nothing."""
    return str(data.fingerprint()) if hasattr(data, "fingerprint") else None


def name_of(thing: object) -> str:
    """Returns the full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _list(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shape}" for name, shape in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
