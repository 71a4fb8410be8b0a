"""Checks of a composed configuration: each refusal names the key, what is allowed, and what came."""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeGuard

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGURATION = Path(__file__).parents[3] / "conf"
MAX_SEED = 2**32 - 1
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def check_values(config: DictConfig) -> None:
    """Refuses values of our own keys that no training can use; imports nothing heavy.

    Raises:
        ValueError: `lr` or `seed` is out of its range.
    """
    lr = config.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ValueError(f"`lr` must be a finite number greater than 0, got {show(lr)}.")
    seed = config.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"`seed` must be a whole number from 0 to {MAX_SEED}, got {show(seed)}.")


def check_additions(config: DictConfig, overrides: list[Override], groups: Callable[[str], bool]) -> None:
    """Refuses a key added with `+` that nothing would read.

    A key below a `_target_` is an argument, which `check_nodes` holds against the signature.

    Raises:
        ValueError: The key is unknown; the message has the nearest known one.
    """
    for override in overrides:
        key = override.key_or_group
        if not (override.is_add() or override.is_force_add()) or key.startswith("hydra.") or groups(key):
            continue
        parents = [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]
        if not any(_has_target(OmegaConf.select(config, parent)) for parent in parents) and key not in known_keys():
            raise ValueError(unknown_key(key))


def _has_target(node: Any) -> TypeGuard[DictConfig]:
    return isinstance(node, DictConfig) and "_target_" in node


def unknown_key(key: str, config_name: str = "train") -> str:
    """Returns the message for a key that nothing reads, with the nearest one that something does."""
    config = _defaults(config_name)
    known = known_keys(config_name)
    parent = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else None
    if _has_target(parent):
        path = key.rpartition(".")[0]
        arguments = _parameters(str(parent["_target_"]), path)
        known += [f"+{path}.{name}" for name in arguments if f"{path}.{name}" not in known]
    nearest = difflib.get_close_matches(key, known, n=1)
    way_out = f"Did you mean `{nearest[0]}`?" if nearest else "All keys: python scripts/train.py --cfg job."
    return f"`{key}` is not a key. {way_out}"


def known_keys(config_name: str = "train") -> list[str]:
    """Returns every key that the configuration has without anything added, dotted."""
    return list(_keys(OmegaConf.to_container(_defaults(config_name))))


def _defaults(config_name: str) -> DictConfig:
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        return compose(config_name)


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if key not in RESERVED and key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys(value, f"{prefix}{key}.")


def check_nodes(config: DictConfig) -> None:
    """Holds every node with a `_target_` against that function's signature: names, and types where they are plain.

    Raises:
        ValueError: An argument is unknown, or of a type that the annotation excludes.
    """
    for path, node in _nodes(config, ""):
        parameters = _parameters(str(node["_target_"]), path)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in node:
            name = str(key)
            if name in RESERVED:
                continue
            if name not in parameters and not takes_any:
                known = difflib.get_close_matches(name, parameters, n=1)
                way_out = f"Did you mean `{path}.{known[0]}`?" if known else f"It takes: {', '.join(parameters)}."
                raise ValueError(f"`{path}.{name}` is not an argument of {node['_target_']}. {way_out}")
            if name in parameters:
                _check_type(f"{path}.{name}", node, name, parameters[name].annotation)


def _nodes(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, ListConfig) or not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield path, node
    for key in node:
        if key != "hydra" and isinstance(node._get_node(key), DictConfig):
            yield from _nodes(node[key], f"{path}.{key!s}" if path else str(key))


def _parameters(target: str, path: str) -> dict[str, inspect.Parameter]:
    try:
        function = get_object(target)
    except Exception as error:
        raise ValueError(f"`{path}._target_` must name something to import, got {target!r}: {error}") from error
    parameters = _signature(function)
    owner = getattr(function, "__self__", None)
    named = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    if inspect.isclass(owner) and len(named) < len(parameters):
        return {**_signature(owner), **named}  # such as DataModule.from_file, which passes its **settings on
    return parameters


def _signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, eval_str=True).parameters)
    except Exception:  # an annotation that only a type checker can follow
        return dict(inspect.signature(function).parameters)


def _check_type(key: str, node: DictConfig, name: str, annotation: Any) -> None:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    allowed = typing.get_args(annotation) if union else (annotation,)
    if not all(kind in WORDS for kind in allowed):
        return
    try:
        value = node[name]
    except OmegaConfBaseException:  # an interpolation into Hydra's runtime, which is not there yet
        return
    if type(value) in allowed or (type(value) is int and float in allowed):
        return
    words = " or ".join(WORDS[kind] for kind in allowed)
    raise ValueError(f"`{key}` must be {words}, got {show(value)}.")


def show(value: Any) -> str:
    """Returns a value as it is written in YAML."""
    return "null" if value is None else repr(value)
