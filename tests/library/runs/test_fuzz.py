"""Broken input of every kind: one line and exit code 1, or a run that ends; never a traceback, never half a folder."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from downslope.runs.checkpoints import CHECKSUM, COMMENT_LENGTH
from tests.conftest import Outcome

pytestmark = pytest.mark.slow

Script = Callable[..., Outcome]
# In `make fuzz` 10,000 in all, over the five tests.
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200")) // 5
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=20_000,  # ms: never a hang
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # the same ones in every `make test`
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
QUICK = ("callbacks=none", "logger=none", "hydra.run.dir=run", "hydra.sweep.dir=run")
SHORT = "++trainer.max_steps=2"  # whatever else is said: some of it would rightly train for days

CELLS = st.one_of(
    st.sampled_from(["1", "-2.5", "1e308", "nan", "inf", "", " ", '"', '"3"', "1,5", "0x1", "١", "1_0", "#", "NA"]),
    st.floats().map(repr),
    st.text(max_size=4),
)
GRIDS = st.tuples(
    st.sampled_from([",", ";", "\t", "|"]), st.lists(st.lists(CELLS, max_size=4), max_size=12), st.booleans()
).map(
    lambda parts: (
        (b"\xef\xbb\xbf" if parts[2] else b"")
        + "\n".join(parts[0].join(row) for row in [["a", "b", "y"], *parts[1]]).encode("utf-8", "surrogatepass")
    )
)
NUMBERS = st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3), min_size=8, max_size=20).map(
    lambda rows: ("a,b,y\n" + "\n".join(",".join(map(repr, row)) for row in rows)).encode()
)
KEYS = st.sampled_from(
    [
        "lr",
        "seed",
        "data",
        "model",
        "optimizer",
        "scheduler",
        "device",
        "trainer",
        "callbacks",
        "logger",
        "experiment",
        "data.path",
        "data.batch_size",
        "data.target",
        "data.features",
        "data.seed",
        "trainer.max_epochs",
        "trainer.devices",
        "trainer.accelerator",
        "model.optimizer",
        "optimizer.lr",
        "optimizer._target_",
        "+optimizer.momentum",
        "~lr",
        "~data",
        "+x",
        "++lr",
        "hydra.job.name",
        "_target_",
    ]
)
VALUES = st.one_of(
    st.sampled_from(
        [
            "0",
            "-1",
            "1",
            "1e9",
            "1e400",
            "nan",
            "null",
            "true",
            "[]",
            "{}",
            "[1,2]",
            "{a:1}",
            "???",
            "${lr}",
            "${x}",
            "${oc.env:X}",
            "''",
            "a,b",
            "1,2",
        ]
    ),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=6),
)


def check(ended: Outcome, before: set[Path]) -> None:
    """A truthful end: refused in one line with nothing written, or done."""
    assert "Traceback" not in ended.out + ended.err
    assert ended.code in (0, 1, 3), ended
    if ended.code == 1:
        assert len(ended.err.splitlines()) == 1, ended
        assert ended.err.startswith("error: "), ended
    else:
        shutil.rmtree("run", ignore_errors=True)
    assert set(Path.cwd().iterdir()) == before, ended


@FUZZ
@given(content=st.one_of(st.binary(max_size=200), GRIDS, NUMBERS))
def test_csv(script: Script, content: bytes) -> None:
    Path("t.csv").write_bytes(content)
    check(script("train", "data.path=t.csv", "data.target=y", *QUICK, SHORT), {Path.cwd() / "t.csv"})


@FUZZ
@given(
    seed=st.integers(0, 2**32), spoil=st.integers(0, 3), values=st.lists(st.one_of(st.none(), st.floats()), max_size=15)
)
def test_parquet(script: Script, seed: int, spoil: int, values: list[float | None]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"a": list(range(len(values))), "y": pyarrow.array(values, pyarrow.float64())})
    parquet.write_table(table, "t.parquet")
    spoiled(Path("t.parquet"), random.Random(seed), spoil)
    check(script("train", "data.path=t.parquet", "data.target=y", *QUICK, SHORT), {Path.cwd() / "t.parquet"})


@FUZZ
@given(overrides=st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3), sweep=st.booleans())
def test_overrides(script: Script, overrides: list[tuple[str, str]], sweep: bool) -> None:
    typed = [f"{key}={value}" for key, value in overrides]
    check(script("train", *(["-m"] if sweep else []), *QUICK, *typed, SHORT), set())


@pytest.fixture
def run(script: Script) -> Path:
    assert script("train", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=kept").code == 0
    shutil.copytree("kept", "spoiled")
    return Path.cwd() / "spoiled"


@FUZZ
@given(
    seed=st.integers(0, 2**32),
    spoil=st.integers(1, 3),
    name=st.sampled_from(["evaluate", "predict"]),
    forged=st.booleans(),
)
def test_checkpoints(script: Script, run: Path, seed: int, spoil: int, name: str, forged: bool) -> None:
    shutil.copy("kept/checkpoints/best.ckpt", run / "checkpoints/best.ckpt")
    spoiled(run / "checkpoints/best.ckpt", random.Random(seed), spoil)
    if forged:  # past the checksum
        body = (run / "checkpoints/best.ckpt").read_bytes()[:-COMMENT_LENGTH]
        digest = hashlib.sha256(body).hexdigest().encode()
        (run / "checkpoints/best.ckpt").write_bytes(body + CHECKSUM + digest)
    Path("new.csv").write_text("age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\n1,2,3,4,5,6,7,8,9,10\n")
    before = set(Path.cwd().iterdir())
    check(script(name, f"run={run}", *(["data.path=new.csv"] if name == "predict" else [])), before)


@FUZZ
@given(seed=st.integers(0, 2**32), spoil=st.integers(1, 3))
def test_stored_configurations(script: Script, run: Path, seed: int, spoil: int) -> None:
    shutil.copy("kept/.hydra/config.yaml", run / ".hydra/config.yaml")
    spoiled(run / ".hydra/config.yaml", random.Random(seed), spoil)
    check(script("evaluate", f"run={run}"), set(Path.cwd().iterdir()))


def spoiled(file: Path, dice: random.Random, how: int) -> None:
    """0 leaves a file whole, 1 cuts it off, 2 flips bits, 3 overwrites a stretch."""
    content = bytearray(file.read_bytes())
    if how == 1:
        del content[dice.randrange(len(content)) :]
    for _ in range(dice.randint(1, 5) if how == 2 else 0):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    if how == 3:
        start = dice.randrange(len(content))
        content[start : start + 20] = dice.randbytes(20)
    file.write_bytes(bytes(content))
