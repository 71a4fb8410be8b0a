"""A run's folder may be a stranger's: what its configuration may name, told before any of it is used.

Your own `conf/` and command line are trusted, and so is what `conf/` names. A stored configuration is data: it may
name what the project's own `conf/` names, the packages below, and what the key `trust` adds.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from downslope.runs.configuration import own_folders

PACKAGES = (
    "downslope.callbacks",
    "lightning.pytorch.callbacks",
    "torch.optim",
)
RESOLVERS = {"hydra"}
MAX_BYTES = 2**20
MAX_DEPTH = 50
TARGET = re.compile(r"^\s*_target_:\s*['\"]?([\w.]+)", re.MULTILINE)
ADDRESS = re.compile(r"^\w{2,}:/")  # a drive's name has one letter


def check_local(path: Any, key: str) -> None:
    """Raises for an address: nothing is ever fetched."""
    if isinstance(path, str) and ADDRESS.match(path):
        raise ValueError(f"`{key}` must be on this machine, got {path!r}: nothing is fetched from an address.")


def read_untrusted(file: Path, trusted: Sequence[str] = (), only: Sequence[str] = ()) -> DictConfig:
    """Reads a stored configuration, and refuses what could do more than describe a run.

    Args:
        file: As Hydra has written it into a run's folder.
        trusted: Packages, functions and resolvers that it may name beside those of this project.
        only: Dotted keys of what is wanted; the rest is left out, and may name anything.

    Raises:
        ValueError: It is no configuration, or names what nobody vouches for. Nothing of it has been executed.
    """
    config = _read(file)
    if only:
        config = _select(file, config, only)
    elif "hydra" in config:
        raise ValueError(f"{file} must describe a run, got `hydra`, which says how commands are to behave.")
    for key, value in _values(OmegaConf.to_container(config)):
        place = f"{file}: `{key}`"
        if _is_target(key):
            _check_target(place, value, trusted)
        elif isinstance(value, str):
            _check_text(place, value, trusted)
    return config


def names_in(config: DictConfig) -> list[str]:
    """Returns every `_target_` and resolver that a composed configuration names: its user vouches for them.

    Example:
        >>> names_in(OmegaConf.create({"model": {"_target_": "mine.Model", "size": "${oc.env:SIZE}"}}))
        ['mine.Model', 'oc.env']
    """
    plain: Any = OmegaConf.to_container(config)
    values = _values({key: plain[key] for key in plain if key != "hydra"})
    texts = [(key, value) for key, value in values if isinstance(value, str)]
    return [name for key, value in texts for name in ([value] if _is_target(key) else _resolvers(key, value))]


def _read(file: Path) -> DictConfig:
    """The file as plain data: no tags, and no aliases, of which a few lines make a billion."""
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} must be a configuration, got more than {MAX_BYTES:,} bytes.")
    try:
        text = file.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ValueError("it has an alias, or is nested too deeply.")
        config = OmegaConf.load(file)
    except (ValueError, yaml.YAMLError, RecursionError, OSError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as a configuration: {reason}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} must be a configuration, got {type(config).__name__}.")
    return config


def _select(file: Path, config: DictConfig, keys: Sequence[str]) -> DictConfig:
    """What is wanted of a configuration, as it stands there: nothing is resolved."""
    selected = OmegaConf.create()
    for key in keys:
        node: Any = OmegaConf.to_container(config)
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is None:
            raise ValueError(f"{file} must hold `{key}`.")
        OmegaConf.update(selected, key, node)
    return selected


def _values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a node, with its dotted key."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        name = f"{path}.{key}" if path else str(key)
        yield name, value
        yield from _values(value, name)


def _is_target(key: str) -> bool:
    return key.rpartition(".")[2] == "_target_"


def _check_target(place: str, target: Any, trusted: Sequence[str]) -> None:
    if isinstance(target, str) and (target in own_targets() or _is_below(target, trusted)):
        return
    if isinstance(target, str) and _is_below(target, PACKAGES):
        # `torch.optim.optimizer.os.system` begins well too: what counts is where it was defined.
        try:
            origin = get_object(target)
        except Exception as error:
            raise ValueError(f"{place} must name something to import, got {target!r}.") from error
        if _is_below(str(getattr(origin, "__module__", "")), PACKAGES):
            return
    raise ValueError(
        f"{place} names {target!r}, which neither your conf/ nor {', '.join(PACKAGES)} holds: nothing of it was run. "
        f"If you trust it: 'trust=[{str(target).partition('.')[0]}]'."
    )


def _check_text(place: str, text: str, trusted: Sequence[str]) -> None:
    for resolver in _resolvers(place, text):
        if resolver not in RESOLVERS and resolver not in trusted:
            raise ValueError(
                f"{place} calls the resolver {resolver!r}: nothing of it was run. "
                f"If you trust it: 'trust=[{resolver}]'."
            )


def _resolvers(place: str, text: str) -> list[str]:
    """What would be called to work out the interpolations in a text."""
    if "${" not in text:
        return []
    try:
        return list(_calls(parse(text)))
    except GrammarParseError as error:
        raise ValueError(f"{place} cannot be read: {' '.join(str(error).split())}") from error


def _calls(tree: Any) -> Iterator[str]:
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        yield tree.resolverName().getText()  # type: ignore[no-untyped-call]
    for child in getattr(tree, "children", None) or ():
        yield from _calls(child)


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def own_targets() -> frozenset[str]:
    """Every `_target_` that the running command's own `conf/` and `--config-dir` name."""
    texts = (file.read_text(encoding="utf-8") for folder in own_folders() for file in folder.rglob("*.yaml"))
    return frozenset(target for text in texts for target in TARGET.findall(text))
