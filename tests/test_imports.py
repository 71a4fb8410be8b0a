from importlinter.cli import lint_imports


def test_the_library_knows_no_template_and_its_arrows_never_turn_back() -> None:
    assert lint_imports(no_cache=True) == 0  # the contracts stand in pyproject.toml
