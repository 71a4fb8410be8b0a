"""Files of a folder that may be a stranger's: regular files alone are opened, of a size, and read as plain values."""

import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 50
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


def read_bytes(file: Path, most: int = MAX_BYTES) -> bytes | None:
    """Returns what a regular file holds, None where there is no such file.

    Raises:
        ValueError: It is a link, a folder, a pipe or a device, or larger than `most`.
        OSError: It cannot be read.
    """
    if not os.path.lexists(file):
        return None
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError(f"{file.name} must be a regular file: no link, folder, pipe or device is opened.")
    with open(file, "rb", opener=open_regular) as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise ValueError(f"{file.name} must have at most {most:,} bytes.")
        return stream.read(most)


def open_regular(path: str, flags: int) -> int:
    """Opens neither a link nor, for ever, a pipe that has taken the file's place meanwhile."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def read_yaml(file: Path) -> Any:
    """Returns the plain values in a file, None where there is none.

    Raises:
        ValueError: It is no YAML, or has a tag, an alias, or more than `MAX_DEPTH` levels.
    """
    content = read_bytes(file)
    if content is None:
        return None
    depth = 0
    try:
        for event in yaml.parse(content, LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or depth > MAX_DEPTH:
                raise ValueError(f"{file.name} must hold plain values: it has a tag, an alias, or too many levels.")
        return yaml.load(content, LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{file.name} is not YAML: {' '.join(str(error).split())}") from error


def printable(value: Any) -> Any:
    r"""Returns texts, and those in lists and dicts, without what steers a terminal or turns writing round.

    Example:
        >>> printable({"lr\x1b[2J": ["a\nb", 0.5]})
        {'lr?[2J': ['a\nb', 0.5]}
    """
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in value)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value


def csv_cell(value: Any) -> Any:
    """Returns a value as a table program shows it: a text that it would take for a formula gets an apostrophe.

    Example:
        >>> csv_cell("=HYPERLINK(1)"), csv_cell("-0.5"), csv_cell(-0.5)
        ("'=HYPERLINK(1)", '-0.5', -0.5)
    """
    if not isinstance(value, str):
        return value
    formula = value.startswith(("=", "+", "-", "@", "\t", "\r")) and finite(value) is None
    return printable(f"'{value}" if formula else value)


def finite(value: Any) -> float | None:
    """Returns a number, or one that a text spells; None for anything else, infinities among it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_regular(folder: Path) -> None:
    """Refuses a folder that is a link, or holds one, a pipe, a socket or a device: writing there could reach elsewhere.

    Raises:
        ValueError: Its name.
    """
    found = [folder, *(Path(path) / name for path, names, files in os.walk(folder) for name in (*names, *files))]
    for each in found:
        mode = each.lstat().st_mode if os.path.lexists(each) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{each} must be a file or a folder, got a link, a pipe, a socket or a device: remove it.")
