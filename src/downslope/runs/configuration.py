"""What a configuration may hold: its keys, where it is composed from, and what a `_target_` takes."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def own_folders() -> list[Path]:
    """Returns the folders that the running command is composed from: its own `conf/`, and every `--config-dir`."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [Path(source.path) for source in sources if source.scheme() == "file"]


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Resolves `${hydra:…}` by a configuration, which Hydra itself does only inside a job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def has_target(node: Any) -> TypeGuard[DictConfig]:
    """Tells whether a node names what is to be made of it."""
    return isinstance(node, DictConfig) and "_target_" in node


def unknown_key(key: str, config_name: str = "train", folder: Path | None = None) -> str:
    """Returns the message for a key that nothing reads, with the nearest one that something does.

    Args:
        key: As typed.
        config_name: The primary configuration.
        folder: Where that lies; not needed while Hydra runs.
    """
    try:
        config = _defaults(config_name, folder)
    except HydraException:  # a primary configuration of one's own, in a folder that is not known any more
        return f"`{key}` is not a key."
    known = list(_keys(OmegaConf.to_container(config)))
    path = key.rpartition(".")[0]
    parent = OmegaConf.select(config, path) if path else None
    if has_target(parent):
        arguments = parameters_of(str(parent["_target_"]), path)
        known += [f"+{path}.{name}" for name in arguments if f"{path}.{name}" not in known]
    nearest = difflib.get_close_matches(key, known, n=1)
    way_out = f"Did you mean `{nearest[0]}`?" if nearest else "All keys: python scripts/train.py --cfg job."
    return f"`{key}` is not a key. {way_out}"


def known_keys() -> list[str]:
    """Returns every key that the configuration has without anything added, dotted; while Hydra runs."""
    return list(_keys(OmegaConf.to_container(_defaults("train"))))


def _defaults(config_name: str, folder: Path | None = None) -> DictConfig:
    running = folder is None or GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(folder), version_base="1.3"):
        return compose(config_name)


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if key not in RESERVED and key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys(value, f"{prefix}{key}.")


@cache
def parameters_of(target: str, path: str) -> dict[str, inspect.Parameter]:
    """Returns by name what the class or function takes that the node at `path` names.

    Raises:
        ValueError: There is no such thing.
    """
    try:
        function = get_object(target)
    except Exception as error:
        raise ValueError(f"`{path}._target_` must name something to import, got {target!r}: {error}") from error
    parameters = _signature(function)
    for base in function.__mro__[1:] if inspect.isclass(function) else ():  # whoever passes its **settings on
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            break
        named = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
        parameters = {**_signature(base), **named}
    return parameters


def _signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, eval_str=True).parameters)
    except Exception:  # an annotation that only a type checker can follow
        return dict(inspect.signature(function).parameters)


def show(value: Any) -> str:
    """Returns a value as it is written in YAML."""
    return "null" if value is None else repr(value)
