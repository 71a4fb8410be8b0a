import contextlib
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from downslope.runs.checkpoints import write_checkpoint
from downslope.runs.trust import check_inside, read_untrusted
from downslope.tables.files import open_table
from tests.conftest import ROOT, Outcome, run_process

Script = Callable[..., Outcome]
HYDRA = partial(initialize_config_dir, str(ROOT / "conf"), version_base="1.3")
EVIL = "import pathlib; pathlib.Path('canary').touch()\ndef Model(**_): pass\n"


class Evil:
    """A pickle that makes a file when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("import pathlib; pathlib.Path('canary').touch()",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    ended = run_process(folder, "train", "trainer.max_epochs=1", "hydra.run.dir=run", "logger=none")
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture
def run(script: Script, trained: Path) -> Path:
    return Path(shutil.copytree(trained, Path.cwd() / "run"))


def commands(run: Path) -> list[tuple[str, ...]]:
    (run.parent / "new.csv").write_text("age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\n" + "1,2,3,4,5,6,7,8,9,10\n")
    return [("evaluate", f"run={run}"), ("predict", f"run={run}", "data.path=new.csv")]


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("legacy", [False, True])
def test_an_evil_pickle_is_never_executed(
    script: Script, run: Path, monkeypatch: pytest.MonkeyPatch, force: str, legacy: bool
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    file = run / "checkpoints/best.ckpt"
    if legacy:
        file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    else:
        torch.save({"state_dict": Evil()}, file)
    for command in commands(run):
        ended = script(*command)
        assert ended.code == 1
        assert ended.err.startswith(f"error: {file} cannot be read as a checkpoint: ")
        assert len(ended.err.splitlines()) == 1
    assert not Path("canary").exists()
    with contextlib.suppress(RuntimeError):  # no checkpoint after all
        torch.load(file, weights_only=False)  # the trap does snap
    assert Path("canary").exists()


def test_the_variable_has_no_say_in_a_process_of_its_own(run: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Evil()}, run / "checkpoints/best.ckpt")
    ended = run_process(tmp_path, "evaluate", f"run={run}", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model._target_", "evil.Model", "names 'evil.Model'"),
        ("model._target_", "os.system", "names 'os.system'"),
        ("model._target_", "builtins.exec", "names 'builtins.exec'"),
        ("model._target_", "torch.load", "names 'torch.load'"),
        ("model._target_", "lightning.pytorch.callbacks.EarlyStopping.on_train_start", "on_train_start"),
        ("logger", {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "ftp://x/y"}}, "an address"),
        ("callbacks.checkpoints.folder", "reference::http://localhost:1/x", "nothing is fetched from an address"),
        ("model._target_", "downslope.tables.table.csv.os.system", "downslope.tables.table.csv"),
        ("model._target_", "torch.optim.optimizer.functools.partial", "torch.optim.optimizer.functools.partial"),
        (
            "model._target_",
            "template.regression.model.LinearRegression.load_from_checkpoint",
            "load_from_checkpoint",
        ),
        ("model._target_", "${seed}", "names '${seed}'"),
        ("data._target_", "evil.Model", "names 'evil.Model'"),
        ("optimizer.deep", [{"_target_": "evil.Model"}], "names 'evil.Model'"),
        ("data.target", "${oc.env:HOME}", "calls the resolver 'oc.env'"),
        ("data.target", "${run_name:}", "calls the resolver 'run_name'"),
        ("data.target", "${${lr}:HOME}", "calls the resolver '${lr}'"),
        ("data.target", "${a:", "cannot be read"),
        ("hydra", {"job_logging": {"handlers": {"file": {"()": "evil.Model"}}}}, "got `hydra`"),
    ],
)
def test_a_strangers_configuration_is_refused_before_anything_is_imported(
    run: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object, said: str
) -> None:
    Path("evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    file = run / ".hydra/config.yaml"
    config = yaml.safe_load(file.read_text())
    node = config
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    config["trust"] = ["evil.Model", "os.system", "oc.env"]  # nobody vouches for himself
    file.write_text(yaml.safe_dump(config))
    with HYDRA(), pytest.raises(ValueError, match=re.escape(said)):
        read_untrusted(file)
    assert not Path("canary").exists()


def test_a_strangers_configuration_ends_a_command_with_one_line(script: Script, run: Path) -> None:
    Path("evil.py").write_text(EVIL)
    file = run / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("template.regression.model.LinearRegression", "evil.Model"))
    for command in commands(run):
        ended = script(*command)
        assert ended.code == 1
        assert "names 'evil.Model'" in ended.err
        assert len(ended.err.splitlines()) == 1
    assert not Path("canary").exists()


def test_a_strangers_run_is_not_gone_on_with(script: Script, run: Path) -> None:
    more = (f"resume={run}", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=3")
    Path("evil.py").write_text(EVIL)
    file = run / ".hydra/config.yaml"
    own = file.read_text()
    file.write_text(own.replace("template.regression.model.LinearRegression", "evil.Model"))
    assert "names 'evil.Model'" in script("train", *more).err
    file.write_text(own)
    for checkpoint in (run / "checkpoints").iterdir():
        write_checkpoint({"state_dict": Evil()}, checkpoint)  # a checksum vouches for nobody
    ended = script("train", *more)
    assert ended.code == 1
    assert "it holds more than plain tensors and plain data" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("canary").exists()


def name_own_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run's configuration name a module that stands in the working folder."""
    Path("mine.py").write_text("from template.regression.model import LinearRegression as Model\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    file = run / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("template.regression.model.LinearRegression", "mine.Model"))


def test_what_the_command_line_names_is_vouched_for(script: Script, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_own_model(run, monkeypatch)
    assert "If you trust it: 'trust=[mine.Model]'" in script("train", f"resume={run}").err
    ended = script("train", f"resume={run}", "model._target_=mine.Model")
    assert ended.code == 0, ended.err
    assert "there is nothing left to do" in ended.out


def test_what_the_user_vouches_for_is_used(script: Script, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_own_model(run, monkeypatch)
    assert "If you trust it: 'trust=[mine.Model]'" in script("evaluate", f"run={run}").err
    ended = script("evaluate", f"run={run}", "trust=[mine.Model]")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "text", ["", "[1]", "3", "a: &a [1]\nb: *a", "!!python/object/apply:os.system ['x']", "[" * 9999]
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with HYDRA(), pytest.raises(ValueError, match=r"config\.yaml"):
        read_untrusted(file)


def test_of_what_hydra_wrote_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hydra.yaml"
    file.write_text("hydra:\n  launcher:\n    _target_: evil.Model\n  overrides:\n    task: [lr=1, 'seed=${lr}']\n")
    with HYDRA(), pytest.raises(ValueError, match="got `hydra`"):
        read_untrusted(file)
    with HYDRA():
        selected = read_untrusted(file, only=["hydra.overrides.task"])
    assert OmegaConf.to_container(selected) == {"hydra": {"overrides": {"task": ["lr=1", "seed=${lr}"]}}}
    with HYDRA(), pytest.raises(ValueError, match=r"must hold `hydra\.runtime\.choices`"):
        read_untrusted(file, only=["hydra.runtime.choices"])
    file.write_text(file.read_text().replace("seed=${lr}", "${oc.env:HOME}"))
    with HYDRA(), pytest.raises(ValueError, match=r"calls the resolver 'oc\.env'"):
        read_untrusted(file, only=["hydra.overrides.task"])


@pytest.mark.parametrize(
    "value", ["/elsewhere", "victim", "../x", "RUN/../x", "~/x", "RUN${data.more}", "${data.path}", "\\\\host\\x"]
)
def test_what_leads_out_of_the_runs_folder_is_refused_whatever_it_is_made_of(tmp_path: Path, value: str) -> None:
    value = value.replace("RUN", str(tmp_path))
    checkpoints = {"folder": f"{tmp_path}/checkpoints", "monitor": "val/loss"}
    data = {"path": "/anywhere/x.csv", "more": "/../x"}
    config = OmegaConf.create({"callbacks": {"checkpoints": checkpoints}, "data": data, "lr": 0.1})
    with HYDRA():
        check_inside(config, tmp_path)
    config.callbacks.checkpoints.folder = value
    with (
        HYDRA(),
        pytest.raises(ValueError, match=r"`callbacks\.checkpoints\.folder` is .* not in the run's own folder"),
    ):
        check_inside(config, tmp_path)
    with HYDRA():
        check_inside(config, tmp_path, [value])
        config.callbacks.checkpoints.folder = "outputs"  # as conf/logger/wandb.yaml has it
        check_inside(config, tmp_path)


def test_a_strangers_configuration_fetches_nothing(script: Script, run: Path) -> None:
    file = run / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("pkg://template.regression/diabetes.csv", "https://localhost:1/x.csv"))
    ended = script("evaluate", f"run={run}")
    assert ended.code == 1
    assert "nothing is fetched from an address" in ended.err


@pytest.mark.parametrize("path", ["pkg://evil/x.csv", "pkg://evil.sub/x.csv", "pkg://nobody/x.csv", "pkg:///x.csv"])
def test_looking_for_a_file_in_a_package_does_not_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "evil/sub").mkdir(parents=True)
    (tmp_path / "evil/__init__.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="there is no such file"):
        open_table(path)
    assert not Path("canary").exists()


@pytest.mark.parametrize("address", ["http://localhost:1/run", "https://localhost:1/x", "s3://x/y", "file:///etc"])
def test_nothing_is_fetched(script: Script, address: str) -> None:
    for command in (("evaluate", f"run={address}"), ("predict", f"run={address}", f"data.path={address}")):
        ended = script(*command)
        assert ended.code == 1
        assert "nothing is fetched from an address" in ended.err
    for key in ("data.path", "resume"):
        assert "nothing is fetched from an address" in script("train", f"{key}={address}").err
    assert not list(Path.cwd().iterdir())


def test_a_database_that_your_own_configuration_names_is_no_strangers_address(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    names = {"data": "template.digits.data.DigitsData", "model": "template.digits.model.DigitClassifier"}
    parts = {name: {"_target_": target} for name, target in {**names, "trainer": "lightning.Trainer"}.items()}
    with HYDRA():
        for uri, is_own in (("sqlite:///outputs/mlflow.db", True), ("sqlite:///elsewhere/mlflow.db", False)):
            file.write_text(yaml.safe_dump({**parts, "logger": {"mlflow": {"tracking_uri": uri}}}))
            with contextlib.nullcontext() if is_own else pytest.raises(ValueError, match="must be on this machine"):
                read_untrusted(file)
