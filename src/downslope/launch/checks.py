"""Checks of a composed configuration: each refusal names the key, what is allowed, and what came."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from downslope.runs.configuration import RESERVED, has_target, known_keys, parameters_of, show, unknown_key

MAX_SEED = 2**32 - 1
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def check_values(config: DictConfig) -> None:
    """Refuses values of our own keys that no training can use; imports nothing heavy.

    Raises:
        ValueError: `lr`, `seed` or `mode` is out of its range.
    """
    if config.get("mode", "min") not in ("min", "max"):
        raise ValueError(f"`mode` must be min or max, got {show(config.mode)}.")
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
        if not any(has_target(OmegaConf.select(config, parent)) for parent in parents) and key not in known_keys():
            raise ValueError(unknown_key(key))


def check_nodes(config: DictConfig) -> None:
    """Holds every node with a `_target_` against that function's signature: names, and types where they are plain.

    Raises:
        ValueError: An argument is unknown, or of a type that the annotation excludes.
    """
    for path, node in _nodes(config, ""):
        parameters = parameters_of(str(node["_target_"]), path)
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
