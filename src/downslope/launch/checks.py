"""Checks of a composed configuration: each refusal names the key, what is allowed, and what came."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from downslope.runs.configuration import RESERVED, has_target, known_keys, parameters_of, show, unknown_key

MAX_SEED = 2**32 - 1
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def check_values(config: DictConfig) -> None:
    """Raises a `ValueError` for values of our own keys that no training can use; imports nothing heavy."""
    mode, lr, seed = config.get("mode", "min"), config.get("lr"), config.get("seed")
    if mode not in ("min", "max"):
        raise ValueError(f"`mode` must be min or max, got {show(mode)}.")
    if type(lr) not in (int, float) or not math.isfinite(lr) or lr <= 0:
        raise ValueError(f"`lr` must be a finite number greater than 0, got {show(lr)}.")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"`seed` must be a whole number from 0 to {MAX_SEED}, got {show(seed)}.")


def check_settings(config: DictConfig) -> None:
    """Raises for a number that the optimizer refuses, where everything else has been built and checked before."""
    check_values(config)
    node = config.get("optimizer")
    if not (has_target(node) and node.get("_partial_")):
        return
    import torch

    target, plain = str(node["_target_"]), OmegaConf.to_container(node, resolve=True)
    settings = {str(name): value for name, value in dict(plain).items() if name not in RESERVED}  # type: ignore[arg-type]
    for name, parameter in parameters_of(target, "optimizer").items():
        if name in settings:
            _check_type(f"optimizer.{name}", node, name, parameter.annotation)
    try:
        get_object(target)([torch.nn.Parameter(torch.zeros(1))], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`optimizer`: {error}") from error


def check_additions(config: DictConfig, overrides: list[Override], groups: Callable[[str], bool]) -> None:
    """Raises a `ValueError`, with the nearest known key, for a key added with `+` that nothing would read.

    A key below a `_target_` is an argument, which `check_nodes` holds against the signature.
    """
    for override in overrides:
        key = override.key_or_group
        if not (override.is_add() or override.is_force_add()) or key.startswith("hydra.") or groups(key):
            continue
        parents = [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]
        if not any(has_target(OmegaConf.select(config, parent)) for parent in parents) and key not in known_keys():
            raise ValueError(unknown_key(key))


def check_nodes(config: DictConfig) -> None:
    """Raises a `ValueError` for an argument that a `_target_` does not take, or whose annotation excludes its type."""
    for path, node in _nodes(config, ""):
        parameters = parameters_of(str(node["_target_"]), path)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for name in map(str, node):
            if name in parameters and name not in RESERVED:
                _check_type(f"{path}.{name}", node, name, parameters[name].annotation)
            elif name not in RESERVED and not takes_any:
                known = difflib.get_close_matches(name, parameters, n=1)
                way_out = f"Did you mean `{path}.{known[0]}`?" if known else f"It takes: {', '.join(parameters)}."
                raise ValueError(f"`{path}.{name}` is not an argument of {node['_target_']}. {way_out}")


def _nodes(node: DictConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    if has_target(node):
        yield path, node
    for key in node:
        if key != "hydra" and isinstance(node._get_node(key), DictConfig) and isinstance(node[key], DictConfig):
            yield from _nodes(node[key], f"{path}.{key!s}" if path else str(key))


def _check_type(key: str, node: DictConfig, name: str, annotation: Any) -> None:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    allowed = typing.get_args(annotation) if union else (annotation,)
    is_made = typing.get_origin(annotation) is Callable
    if not (is_made or all(kind in WORDS for kind in allowed)):
        return
    try:
        value = node[name]
    except OmegaConfBaseException:  # an interpolation into Hydra's runtime, which is not there yet
        return
    if is_made:
        if not (value is None or has_target(value) or callable(value)):
            raise ValueError(f"`{key}` must be a `_target_` with `_partial_: true`, got {show(value)}.")
        return
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        way_out = f" To pass it as text, use both kinds of quotes: '{key}=\"{value}\"'." if str in allowed else ""
        kinds = " or ".join(WORDS[kind] for kind in allowed)
        raise ValueError(f"`{key}` must be {kinds}, got {show(value)}.{way_out}")
