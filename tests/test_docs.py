"""What README and docs say is there: links, paths, modules, keys, and commands that compose. Nothing is trained."""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from new import new_task
from rename import PACKAGE

from tests.conftest import ROOT

PAGES = {page.name: page for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
NOW = {name: page for name, page in PAGES.items() if name != "CHANGELOG.md"}  # which tells of former names, too
FOLDERS = ("conf", "docs", "scripts", "src", "tests")
NUMBER = re.compile(r"[\d.]+")
EXTRAS = re.compile(r"\+?hydra[./](launcher|sweeper)\b")  # of packages that need not be installed
HYDRA_SCRIPTS = ("train", "evaluate", "predict")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages have their reader write: `make new NAME=houses`, and YAML with a path."""
    folder = tmp_path_factory.mktemp("project")
    new_task("houses", folder)
    for text in _texts():
        for language, block in _blocks(text):
            path = re.match(r"# (conf/\S+\.yaml)\n", block)
            if language == "yaml" and path:
                file = folder / path[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block)
    return folder


def _texts() -> list[str]:
    return [page.read_text() for page in NOW.values()]


def _blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _spans(text: str) -> list[str]:
    """What stands in backticks outside of the blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a page, in words: of shell blocks, and those in backticks; not those that are shown refused."""
    lines = [span for span in _spans(text) if re.match(r"(python scripts/|make \w)", span)]
    for language, block in _blocks(text):
        joined = block.replace("\\\n", " ").splitlines()
        if language == "bash":
            lines += joined
        elif language == "console":
            after = [*joined[1:], ""]
            shown = [line for line, next_line in zip(joined, after, strict=True) if not next_line.startswith("error:")]
            lines += [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        yield list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(name: str) -> None:
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in _anchors(file.read_text()), target


def _anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NOW)
def test_every_path_that_is_named_exists(name: str, project: Path) -> None:
    pattern = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w/.-]*")
    paths = [span for span in _spans(NOW[name].read_text()) if pattern.fullmatch(span)]
    assert [path for path in paths if not ((ROOT / path).exists() or (project / path).exists())] == []


@pytest.mark.parametrize("name", NOW)
def test_every_module_class_and_function_that_is_named_exists(name: str, project: Path) -> None:
    text = NOW[name].read_text()
    dotted = set(re.findall(rf"(?<![\w./-])(?:downslope|{PACKAGE})(?:\.\w+)+", " ".join(_spans(text))))
    for language, block in _blocks(text):
        if language == "python":
            imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
            dotted |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        if language == "yaml":
            dotted |= set(re.findall(rf"_target_: ({PACKAGE}\.\S+)", block))
    ours = re.compile(rf"(downslope|{PACKAGE})\.")
    assert {
        each
        for each in dotted
        if ours.match(each) and not any(_exists(each, folder / "src") for folder in (ROOT, project))
    } == set()


def _exists(dotted: str, source: Path) -> bool:
    """Whether a package, a module, or a name at the top of one is there; nothing is imported."""
    path, name = source / dotted.replace(".", "/"), dotted.rpartition(".")[2]
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = path.parent / "__init__.py" if path.parent.is_dir() else path.parent.with_suffix(".py")
    return file.is_file() and name in _names(ast.parse(file.read_text()))


def _names(module: ast.Module) -> set[str]:
    found = set()
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("name", NOW)
def test_every_option_and_every_key_of_data_and_callbacks_exists(name: str, project: Path) -> None:
    spans = [word for span in _spans(NOW[name].read_text()) for word in span.split()]
    chosen = [pair for word in spans if (pair := re.fullmatch(r"([a-z]+)=([a-z_]+)", word))]
    for group, option in (pair.groups() for pair in chosen):
        if (ROOT / "conf" / group).is_dir():
            assert any((folder / "conf" / group / f"{option}.yaml").is_file() for folder in (ROOT, project)), option
    keys = [key[1] for word in spans if (key := re.match(r"((?:data|callbacks)(?:\.(?!py\b)[a-z_]+)+)(=|$)", word))]
    assert set(keys) - _keys_of("data", "callbacks") == set()


def _keys_of(*groups: str) -> set[str]:
    files = [(group, file) for group in groups for file in (ROOT / "conf" / group).glob("*.yaml")]
    return {key for group, file in files for key in _flat(yaml.safe_load(file.read_text()), group)}


def _flat(node: Any, prefix: str) -> Iterator[str]:
    yield prefix
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _flat(value, f"{prefix}.{key}")


@pytest.mark.parametrize("name", NOW)
def test_every_command_names_a_script_or_target_and_composes(name: str, project: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in _commands(NOW[name].read_text()):
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        elif words[:1] == ["python"]:
            script = ROOT / words[1].removeprefix("../downslope/")
            assert script.is_file(), words
            if script.parent.name == "scripts" and script.stem in HYDRA_SCRIPTS:
                _compose_all(script.stem, words[2:], project)
            else:
                said = script.read_text()
                assert all(word in said for word in words[2:] if "…" not in word and not NUMBER.fullmatch(word)), words


def _compose_all(config: str, words: list[str], project: Path) -> None:
    """Composes a command with the first values of what it sweeps over, and with each option of a group."""
    words = [word for word, before in zip(words, ["", *words], strict=False) if before not in ("--config-dir", "--cfg")]
    overrides = [word.replace("…", "x") for word in words if not (word.startswith("-") or EXTRAS.match(word))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        choices = [_choices(override, loader) for override in overrides if override != "x"]
        for index in range(max(map(len, choices), default=1)):
            chosen = [each[min(index, len(each) - 1)] for each in choices]
            compose(config, [*chosen, f"hydra.searchpath=[file://{project / 'conf'}]"])


def _choices(override: str, loader: ConfigLoader) -> list[str]:
    """The override itself; of a sweep its first value, or every option of a group."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    if not parsed.is_choice_sweep():
        return [f"{parsed.get_key_element()}=1"]  # an interval: the key is what counts
    options = [f"{parsed.key_or_group}={value}" for value in parsed.sweep_string_iterator()]
    return options if loader.get_group_options(parsed.key_or_group) else options[:1]


def test_readme_is_of_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_readme_links_every_page_of_the_docs() -> None:
    linked = re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(linked)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["lrr=0.1"], "lrr"), (["optimizer=sgd,adamm"], "adamm"), (["callbacks.pictures.frequency=…"], "frequency")],
)
def test_a_command_with_a_mistake_would_be_found(words: list[str], message: str, project: Path) -> None:
    with pytest.raises(Exception, match=message):
        _compose_all("train", words, project)


def test_a_module_or_a_name_that_is_not_there_would_be_found() -> None:
    assert _exists("downslope.callbacks.GradientMonitor", ROOT / "src")
    assert _exists("template.train.build", ROOT / "src")
    assert not _exists("downslope.callbacks.GradientMonitors", ROOT / "src")
    assert not _exists("downslope.models.manual", ROOT / "src")
