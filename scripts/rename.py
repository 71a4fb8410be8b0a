"""Gives the package of your tasks another name, wherever it is spoken of: make rename NAME=houses."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from new import check_name

ROOT = Path(__file__).parents[1]
PACKAGE = "template"  # renamed as well, so that it can be done again
PLACES = (".ci", "conf", "docs", "scripts", "src", "tests", "Makefile", "pyproject.toml", "*.md")


def rename(name: str, root: Path = ROOT) -> list[Path]:
    """Renames the package's folders, and its name in code, configuration, tests and docs.

    Args:
        name: The new one, in snake_case.
        root: The project's folder.

    Returns:
        The files that speak of it, as they are called now.

    Raises:
        ValueError: It cannot be a name, or is that of something else; nothing has been changed.
    """
    check_name(name)
    if importlib.util.find_spec(name) or (root / "src" / name).exists() or (root / name).exists():
        raise ValueError(f"NAME must be a new one, got {name!r}, which is the name of something else.")
    paths = list(_paths(root))
    folders = [path for path in paths if path.name == PACKAGE and path.is_dir()]
    pattern = _uses({child.stem for folder in folders for child in folder.iterdir()})
    changed = [path for path in paths if path.is_file() and _replace(path, pattern, name)]
    for folder in sorted(folders, reverse=True):  # the inner ones first
        folder.rename(folder.with_name(name))
    return [root / "/".join(_renamed(path.relative_to(root).parts, name)) for path in changed]


def _paths(root: Path) -> Iterator[Path]:
    for place in PLACES:
        for path in root.glob(place):
            yield path
            yield from (each for each in path.rglob("*") if "__pycache__" not in each.parts)


def _uses(modules: set[str]) -> re.Pattern[str]:
    """Finds the package's name where it is one, and not the word: imports, dotted names, paths, quotes."""
    dotted = "|".join(map(re.escape, sorted(modules)))
    return re.compile(
        rf"(?<![\w.-]){PACKAGE}(?=/|\.(?:{dotted})\b)"  # src/…/train.py, … .train
        rf"|(?<=[\"'`/]){PACKAGE}(?=[\"'`])"
        rf"|(?<=\bfrom ){PACKAGE}(?= import\b)|(?<=^import ){PACKAGE}$",
        re.MULTILINE,
    )


def _replace(file: Path, pattern: re.Pattern[str], name: str) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture, a table
        return False
    renamed = pattern.sub(name, text)
    if renamed != text:
        file.write_text(renamed, encoding="utf-8")
    return renamed != text


def _renamed(parts: tuple[str, ...], name: str) -> list[str]:
    return [name if part == PACKAGE else part for part in parts]


def main(name: str) -> None:
    """Renames, and says what comes next."""
    try:
        files = rename(name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"src/{name}, and {len(files)} files that mention it. Next: make format, then make test.")
    print("Earlier runs name the old package: they can be looked at, but not resumed or evaluated.")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
