"""A run's folder may be a stranger's, and is only data: what its configuration may name is decided before it is used.

Exact names only. Allowed is what stands, letter for letter, as a `_target_` in the folders that this very command is
composed from (its own `conf/`, a `--config-dir` that is given now), what its command line names, and what the key
`trust` adds. It must be a class or function that stands in a module: never something that is reached through one.
Of resolvers `${hydra:…}` is allowed, and what the command line and `trust` name. No value may be an address, nor, where
the run is resumed, a path that leads out of its folder.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from downslope.runs.configuration import own_folders
from downslope.runs.plain_files import read_yaml

TARGET = re.compile(r"^\s*_target_:\s*['\"]?([\w.]+)", re.MULTILINE)
FOLDERS = ("folder", "save_dir", "root_dir", "log_dir", "dirpath", "default_root_dir", "tracking_uri")  # to write into
FOLDER = re.compile(rf"^\s*(?:{'|'.join(FOLDERS)}):\s*['\"]?([^'\"#\n]+?)['\"]?\s*(?:#.*)?$", re.MULTILINE)
OUTPUT = Path("${hydra:runtime.output_dir}")
ADDRESS = re.compile(r"(?!pkg://)\w[\w+.-]+:/|.*::")  # a scheme, of more letters than a drive has, or a chain of them


def check_local(path: Any, key: str) -> None:
    """Raises for an address: nothing is ever fetched."""
    if isinstance(path, str) and ADDRESS.match(path):
        raise ValueError(f"`{key}` must be on this machine, got {path!r}: nothing is fetched from an address.")


def read_untrusted(file: Path, trusted: Sequence[str] = (), only: Sequence[str] = ()) -> DictConfig:
    """Reads a stored configuration, and refuses what could do more than describe a run.

    Args:
        file: As Hydra has written it into a run's folder.
        trusted: Classes, functions and resolvers that it may name beside those of the running command.
        only: Dotted keys of what is wanted; the rest is left out, and may name anything.

    Raises:
        ValueError: It is no configuration, or names what nobody vouches for. Nothing of it has been executed.
    """
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise ValueError(f"{file} must be a configuration, got {type(plain).__name__}.")
    if only:
        plain = _selected(file, plain, only)
    elif "hydra" in plain:
        raise ValueError(f"{file} must describe a run, got `hydra`, which says how commands are to behave.")
    else:
        _check_parts(file, plain)
    allowed, own = {*_in_own_files(TARGET), *trusted}, {*_in_own_files(FOLDER), *trusted}
    for key, value in _values(plain):
        place = f"{file}: `{key}`"
        if _is_target(key):
            _check_target(place, value, allowed)
        elif isinstance(value, str):
            if value not in own:  # a logger's database, as your own conf/ names it
                check_local(value, f"{file}: {key}")
            for resolver in _resolvers(place, value):
                if resolver not in ("hydra", *trusted):
                    raise ValueError(f"{place} calls the resolver {resolver!r}: {_way_out(resolver)}")
    try:
        config: DictConfig = OmegaConf.create({} if only else plain)
        for key in only:
            OmegaConf.update(config, key, plain[key])
        return config
    except OmegaConfBaseException as error:
        raise ValueError(f"{file} cannot be read as a configuration: {' '.join(str(error).split())}") from error


def _check_parts(file: Path, plain: dict[str, Any]) -> None:
    """Raises where a part of a run is not what is made, or settings by name."""
    for name in ("data", "model", "trainer"):
        if not (isinstance(plain.get(name), dict) and "_target_" in plain[name]):
            raise ValueError(f"{file}: `{name}` must say by a `_target_` what is made, got {plain.get(name)!r}.")
    for name in ("device", "callbacks", "logger"):
        if not isinstance(plain.get(name, {}), dict):
            raise ValueError(f"{file}: `{name}` must be settings by name, got {plain[name]!r}.")


def check_inside(config: DictConfig, folder: Path, trusted: Sequence[str] = ()) -> None:
    """Refuses a stored configuration by which something would be written beside the run's folder.

    Args:
        config: As it is about to be used, so that every interpolation in it has a value.
        folder: The run's.
        trusted: Values that may lead elsewhere, as they stand in the configuration, beside those in your own files.

    Raises:
        ValueError: The key and its value.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    stored: Any = OmegaConf.to_container(own)
    as_stored, allowed = dict(_values(stored)), {*_in_own_files(FOLDER), *trusted}
    for key, value in _values(OmegaConf.to_container(own, resolve=True)):
        if isinstance(value, str) and as_stored.get(key) not in allowed and _leads_out(key, value, folder):
            raise ValueError(f"`{key}` is {value!r}, which is not in the run's own folder: {_way_out(value)}")


def _leads_out(key: str, value: str, folder: Path) -> bool:
    """Tells whether something could be written elsewhere; data are only read."""
    if key.startswith("data."):
        return False
    is_path = value.startswith(("/", "~", "\\")) or key.rpartition(".")[2] in FOLDERS
    return ".." in re.split(r"[/\\]", value) or (is_path and not Path(value).is_relative_to(folder))


def names_in(config: DictConfig) -> list[str]:
    """Returns every `_target_`, resolver and folder that a composed configuration names: its user vouches for them.

    Example:
        >>> names_in(OmegaConf.create({"model": {"_target_": "mine.Model", "size": "${oc.env:SIZE}"}}))
        ['mine.Model', 'oc.env']
    """
    plain: Any = OmegaConf.to_container(config)
    plain.pop("hydra", None)
    texts = [(key, value) for key, value in _values(plain) if isinstance(value, str)]
    named = [value for key, value in texts if _is_target(key) or _leads_out(key, value, OUTPUT)]
    return named + [name for key, value in texts if not _is_target(key) for name in _resolvers(key, value)]


def _in_own_files(pattern: re.Pattern[str]) -> set[str]:
    """What stands in the folders that the running command is composed from."""
    files = [file for folder in own_folders() for file in folder.rglob("*.yaml")]
    return {found for file in files for found in pattern.findall(file.read_text(encoding="utf-8"))}


def _selected(file: Path, plain: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """What is wanted of a configuration, by dotted key."""
    values = dict(_values(plain))
    for key in keys:
        if values.get(key) is None:
            raise ValueError(f"{file} must hold `{key}`.")
    return {key: values[key] for key in keys}


def _values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a node, with its dotted key."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        name = f"{path}.{key}" if path else str(key)
        yield name, value
        yield from _values(value, name)


def _is_target(key: str) -> bool:
    return key.rpartition(".")[2] == "_target_"


def _check_target(place: str, target: Any, allowed: set[str]) -> None:
    if not isinstance(target, str) or target not in allowed:
        raise ValueError(f"{place} names {target!r}, which no file of your conf/ names: {_way_out(target)}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)  # what your own files name is yours to import
    except Exception as error:
        raise ValueError(f"{place} must name something to import, got {target!r}: {error}") from error
    if not (isclass(found) or isfunction(found)):
        raise ValueError(f"{place} must name a class or function of a module, got {target!r}.")


def _way_out(name: Any) -> str:
    return f"nothing in it was run. If you trust it: 'trust=[{name}]'."


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
