from functools import partial

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from downslope.launch.checks import check_additions, check_nodes, check_values
from downslope.runs.configuration import unknown_key
from tests.conftest import ROOT

GROUPS = ["data", "model", "optimizer", "scheduler", "device", "trainer", "callbacks", "logger", "experiment"]
OPTIONS = [f"{group}={file.stem}" for group in GROUPS for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
HYDRA = partial(initialize_config_dir, str(ROOT / "conf"), version_base="1.3")


def composed(*overrides: str) -> DictConfig:
    with HYDRA():
        return compose("train", list(overrides))


def test_the_configuration_is_the_documented_one() -> None:
    config = composed()
    assert OmegaConf.to_container(config.optimizer, resolve=True) == {
        "_target_": "torch.optim.SGD",
        "_partial_": True,
        "lr": 0.02,
    }
    assert OmegaConf.to_container(config.data, resolve=True) == {
        "_target_": "template.regression.data.TableData",
        "path": "pkg://template.regression/diabetes.csv",
        "target": "progression",
        "features": None,
        "exclude": None,
        "weight": None,
        "text": "one_hot",
        "max_values": 50,
        "missing": "drop",
        "decimal": None,
        "in_memory": "auto",
        "batch_size": 64,
        "standardize": True,
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
        "seed": 0,
    }
    assert set(config) == {"lr", "seed", "monitor", "mode", "resume", "resume_override", "trust", *GROUPS} - {
        "experiment"
    }


def test_the_learning_rate_is_one() -> None:
    for optimizer in ("sgd", "momentum", "adam", "adamw", "lbfgs"):
        assert composed("lr=0.7", f"optimizer={optimizer}").optimizer.lr == 0.7


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_fits_its_signatures(option: str) -> None:
    given = ["data.path=a.csv", "data.target=y"] if option == "data=table" else []
    config = composed(option, *given)
    check_values(config)
    check_nodes(config)


def test_every_option_says_what_it_does() -> None:
    for file in (ROOT / "conf").glob("*/*.yaml"):
        first, *rest = file.read_text().splitlines()
        if file.parent.parent.name == "conf" and file.parent.name != "hydra":
            assert first.startswith("#") or rest[0].startswith("#") or file.stem == "default", file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=-1", "`lr` must be a finite number greater than 0, got -1"),
        ("lr=0", "`lr` must be a finite number greater than 0, got 0"),
        ("lr=abc", "`lr` must be a finite number greater than 0, got 'abc'"),
        ("lr=nan", "`lr` must be a finite number greater than 0, got nan"),
        ("lr=inf", "`lr` must be a finite number greater than 0, got inf"),
        ("lr=null", "`lr` must be a finite number greater than 0, got null"),
        ("lr=true", "`lr` must be a finite number greater than 0, got True"),
        ("lr=[1]", "`lr` must be a finite number greater than 0"),
        ("seed=-1", "`seed` must be a whole number from 0 to 4294967295, got -1"),
        ("seed=4294967296", "`seed` must be"),
        ("seed=1.5", "`seed` must be"),
        ("seed=null", "`seed` must be"),
    ],
)
def test_values_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 — the message is compared below, without a pattern
        check_values(composed(override))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_epochs=three", "`trainer.max_epochs` must be a whole number or null, got 'three'"),
        ("trainer.max_epochs=1.5", "`trainer.max_epochs` must be a whole number or null, got 1.5"),
        ("data.batch_size=many", "`data.batch_size` must be a whole number, got 'many'"),
        ("data.standardize=1", "`data.standardize` must be true or false, got 1"),
        ("+trainer.max_step=3", "`trainer.max_step` is not an argument of lightning.Trainer. Did you mean"),
        ("+data.rows=3", "`data.rows` is not an argument of template.regression.data.TableData. It takes: "),
        ("optimizer._target_=torch.optim.SDG", "`optimizer._target_` must name something to import"),
    ],
)
def test_arguments_are_held_against_the_signature(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 — the message is compared below, without a pattern
        check_nodes(composed(override))
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["+foo=bar", "++foo=bar", "+data_path=x", "+lrr=1", "+callbacks.mine.every=3"])
def test_a_key_that_nothing_reads_is_refused_even_with_a_plus(key: str) -> None:
    overrides, config = OverridesParser.create().parse_overrides([key]), composed(key)
    with HYDRA(), pytest.raises(ValueError, match="is not a key"):
        check_additions(config, overrides, groups=lambda name: False)


@pytest.mark.parametrize(
    "key", ["+trainer.max_steps=3", "+callbacks.mine._target_=downslope.callbacks.Progress", "++lr=0.1", "+hydra.x=1"]
)
def test_a_key_that_something_reads_passes(key: str) -> None:
    config = composed(*([] if key.startswith("+hydra") else [key]))
    with HYDRA():
        check_additions(config, OverridesParser.create().parse_overrides([key]), groups=lambda name: False)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lrr", "Did you mean `lr`?"),
        ("trainer.max_epoch", "Did you mean `trainer.max_epochs`?"),
        ("optimizer.momentu", "Did you mean `+optimizer.momentum`?"),
        ("zzz", "All keys: python scripts/train.py --cfg job."),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(key: str, nearest: str) -> None:
    assert unknown_key(key, folder=ROOT / "conf") == f"`{key}` is not a key. {nearest}"
