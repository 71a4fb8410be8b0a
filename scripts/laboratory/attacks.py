"""What a stranger may have put into a run's folder or a sweep's: each attack changes a copy of an honest one."""

import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from downslope.logs.event_files import masked_checksum
from downslope.runs.checkpoints import CHECKSUM, COMMENT_LENGTH, load_checkpoint, write_checkpoint

MARKUP = "<script>document.title='owned'</script>"
FORMULA = '=HYPERLINK("http://127.0.0.1/","look")'
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
LONE_SURROGATE = '"\\ud800"'


@dataclass(frozen=True)
class Ground:
    """Where an attack takes place.

    Attributes:
        folder: The run's folder, or the sweep's, that it prepares.
        outside: What it tries to reach: files that must stay as they are.
        canary: What its code makes, if it ever runs.
        port: Of a listener on loopback that nobody must call.
        random: Decides where there is a choice.
    """

    folder: Path
    outside: Path
    canary: Path
    port: int
    random: Random

    @property
    def touch(self) -> str:
        """A shell command that leaves the canary."""
        return f"touch '{self.canary}'"


@dataclass(frozen=True)
class Attack:
    """One way to do harm.

    Attributes:
        name: Its kind, and what is special about it.
        plant: Prepares the ground.
        on_sweep: Whether that is a sweep's folder, else a run's, which may be a job's.
        dashboard: Whether TensorBoard reads it, too.
    """

    name: str
    plant: Callable[[Ground], None]
    on_sweep: bool = False
    dashboard: bool = False


class Snap:
    """A pickle that leaves the canary when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def attacks() -> list[Attack]:
    """Returns all of them, in the order of their names."""
    kinds = (names, resolvers, paths, links, special_files, addresses, sizes, types, texts, tags, pickles, events)
    return [attack for kind in kinds for attack in kind()]


def change(ground: Ground, keys: str, value: Any, name: str = "config.yaml") -> None:
    """Sets a dotted key of the stored configuration."""
    file = ground.folder / ".hydra" / name
    config = yaml.safe_load(file.read_text())
    node = config
    *parents, last = keys.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value
    file.write_text(yaml.safe_dump(config))


def replace(ground: Ground, name: str, content: str | bytes) -> None:
    """Writes a file of the folder anew."""
    file = ground.folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def arguments(ground: Ground) -> dict[str, tuple[Any, ...]]:
    """The names that a stored configuration must not call, with arguments that would do harm."""
    checkpoint = str(ground.folder / "evil.pt")
    victim = str(ground.outside / "folder")
    python = f"__import__('os').system({ground.touch!r})"
    return {
        "evil.Model": (),
        "os.system": (ground.touch,),
        "os.removedirs": (victim,),
        "builtins.exec": (python,),
        "builtins.eval": (python,),
        "builtins.open": (str(ground.outside / "new"), "w"),
        "subprocess.run": (["touch", str(ground.canary)],),
        "shutil.rmtree": (victim,),
        "runpy.run_path": (str(ground.folder / "evil.py"),),
        "importlib.import_module": ("evil",),
        "torch.load": (checkpoint,),
        "torch.hub.load": (str(ground.folder), "Model"),
        "pathlib.Path.touch": (str(ground.canary),),
        "logging.config.dictConfig": ({"version": 1, "handlers": {"x": {"()": "evil.Model"}}},),
        "hydra.utils.instantiate": ({"_target_": "os.system", "_args_": [ground.touch]},),
        "hydra.utils.get_method": ("evil.Model",),
        "hydra.utils.get_object": ("evil.Model",),
        "hydra._internal.instantiate._instantiate2.instantiate": ({"_target_": "evil.Model"},),
        "functools.partial": (),
        "template.regression.model.LinearRegression.load_from_checkpoint": (checkpoint,),
        "lightning.pytorch.callbacks.ModelCheckpoint._remove_checkpoint": (None, victim),
        "lightning.pytorch.loggers.CSVLogger": (victim,),
        "template.train.train": (),
        "template.regression.model.torch.hub.load": (str(ground.folder), "Model"),
        "downslope.runs.whole_files.whole_file": (victim,),
        "downslope.callbacks.Checkpoints.on_train_end": (None, None),
        "downslope.callbacks.checkpoints.torch.load": (checkpoint,),
    }


PLACES = ("model", "data", "trainer", "optimizer", "callbacks.evil", "logger.evil", "model.optimizer.evil", "data.list")


def names() -> Iterator[Attack]:
    """A `_target_` that is nobody's, on its own and nested, and the spellings of one."""

    def plant(ground: Ground, name: str, place: str) -> None:
        torch.save({"state_dict": Snap(ground.touch)}, ground.folder / "evil.pt")
        code = f"import os\nos.system({ground.touch!r})\ndef Model(*_, **__): pass\n"
        replace(ground, "evil.py", code)
        replace(ground, "hubconf.py", code)
        node: Any = {"_target_": name, "_args_": list(arguments(ground)[name])}
        change(ground, place, [node] if place == "data.list" else node)

    example = Ground(Path(), Path(), Path(), 0, Random(0))
    for number, name in enumerate(arguments(example)):
        for place in (PLACES[number % len(PLACES)], PLACES[(number + 3) % len(PLACES)]):
            yield Attack(f"names: {name} as {place}", partial(plant, name=name, place=place))

    def spell(ground: Ground, target: Any) -> None:
        change(ground, "callbacks.evil", {"_target_": target, "_args_": [ground.touch], "command": ground.touch})

    for target in ("os\uff0esystem", " os.system", "os.system\n", ["os.system"], {"a": "os.system"}, None, 1, "${lr}"):
        yield Attack(f"names: spelt {target!r}", partial(spell, target=target))

    def flat(ground: Ground) -> None:
        change(ground, "model", None)
        replace(ground, ".hydra/config.yaml", f"model._target_: os.system\nmodel._args_: [{ground.touch}]\n")

    yield Attack("names: flat keys", flat)
    for name in ("config.yaml", "hydra.yaml"):
        hydra = {
            "callbacks": {"evil": {"_target_": "evil.Model"}},
            "job_logging": {"handlers": {"x": {"()": "evil.M"}}},
        }
        yield Attack(f"names: hydra in {name}", partial(change, keys="hydra", value=hydra, name=name))
    typed = ["hydra.callbacks.evil._target_=os.system", "model._target_=os.system", "hydra/launcher=evil"]
    for key in ("hydra.overrides.task", "hydra.overrides.hydra"):
        yield Attack(f"names: {key}", partial(change, keys=key, value=typed, name="hydra.yaml"))
    yield Attack(
        "names: choices", partial(change, keys="hydra.runtime.choices", value={"model": "evil"}, name="hydra.yaml")
    )
    yield Attack("names: trust by itself", partial(change, keys="trust", value=["os.system", "evil"]))


def resolvers() -> Iterator[Attack]:
    """Interpolations that call something, `siege` among them, which leaves the canary."""
    texts = (
        "${siege:}", "${siege:${lr}}", "a ${siege:} b", "${oc.env:SIEGE_SECRET}", "${oc.create:{a: 1}}",
        "${oc.decode:'${siege:}'}", "${${monitor}:}", "${hydra:job.env_set}", "${run_name:}", "${oc.dict.values:data}",
        "${siege:", "\\\\${siege:}", "${lr}${siege:x}", "${data.${siege:}}",
    )  # fmt: skip
    for text in texts:
        for key in ("data.target", "monitor"):
            yield Attack(f"resolvers: {text} as {key}", partial(change, keys=key, value=text))


def paths() -> Iterator[Attack]:
    """Folders to write into that are not the run's."""

    def elsewhere(ground: Ground, key: str, way: str) -> None:
        where = {"absolute": str(ground.outside / "folder"), "relative": "victim", "upwards": "../outside/folder",
                 "by the run": "${hydra:runtime.output_dir}/../outside/folder"}[way]  # fmt: skip
        change(ground, key, where)

    keys = ("callbacks.checkpoints.folder", "logger.tensorboard.save_dir", "trainer.default_root_dir")
    for key in keys:
        for way in ("absolute", "relative", "upwards", "by the run"):
            yield Attack(f"paths: {key} {way}", partial(elsewhere, key=key, way=way))

    def loggers(ground: Ground) -> None:
        node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "${hydra:runtime.output_dir}"}
        change(ground, "logger.csv", node | {"name": "../../outside/folder"})

    yield Attack("paths: a logger's name", loggers)

    def defaults(ground: Ground) -> None:
        change(ground, "callbacks", {})
        change(ground, "trainer.enable_checkpointing", True)

    yield Attack("paths: Lightning's own checkpoints", defaults)

    def recorder(ground: Ground) -> None:
        node = {"_target_": "downslope.callbacks.FlightRecorder", "folder": str(ground.outside / "folder")}
        change(ground, "trainer.callbacks", [node])

    yield Attack("paths: trainer.callbacks", recorder)


FILES = (
    ".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "checkpoints",
    "checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/previous.ckpt", "result.json", "train.log", "events",
)  # fmt: skip
NEW_FILES = (
    "checkpoints/last.ckpt.partial", "checkpoints/best.ckpt.partial", "checkpoints/previous.ckpt.partial",
    "result.json.partial", ".lock", ".hydra.partial", "flight_record.json", "events.out.tfevents.9.x",
)  # fmt: skip
SWEEP_FILES = ("multirun.yaml", "sweep.csv", "report.html", "learning_rate.png")


def _file(ground: Ground, name: str) -> Path:
    pattern = {"events": "events.out.*", "job": "*lr=0.04*"}.get(name)
    return next(ground.folder.glob(pattern)) if pattern else ground.folder / name


def link(ground: Ground, name: str, way: str) -> None:
    """Puts a link in a file's place: to what stood there, moved outside; to another file; or to nothing."""
    file, target = _file(ground, name), ground.outside / "target"
    if way == "moved" and file.exists():
        shutil.move(file, target)
    elif way == "a file":
        target = ground.outside / "file.txt"
    elif way == "a folder":
        target = ground.outside / "folder"
    if os.path.lexists(file):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target, target_is_directory=target.is_dir())


def links() -> Iterator[Attack]:
    """Links in every file's place, and the folder as one."""
    for name in FILES:
        for way in ("moved", "dangling"):
            yield Attack(f"links: {name} {way}", partial(link, name=name, way=way))
    for name in NEW_FILES:
        for way in ("a file", "dangling"):
            yield Attack(f"links: {name} {way}", partial(link, name=name, way=way))
    yield Attack("links: checkpoints a folder", partial(link, name="checkpoints", way="a folder"))
    for name in SWEEP_FILES:
        for file in (name, f"{name}.partial"):
            yield Attack(f"links: {file} a file", partial(link, name=file, way="a file"), on_sweep=True)

    for way in ("moved", "dangling", "a folder"):
        yield Attack(f"links: a job {way}", partial(link, name="job", way=way), on_sweep=True)
    yield Attack("links: another job", partial(link, name="lr=0.05", way="a folder"), on_sweep=True)


def special(ground: Ground, name: str, kind: str) -> None:
    """Puts a pipe, a socket or a device in a file's place."""
    file = _file(ground, name)
    if os.path.lexists(file):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        os.chdir(file.parent)  # its address has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file.name)
    else:
        try:
            os.mknod(file, 0o600 | 0o020000, os.makedev(1, {"zero": 5, "full": 7}[kind]))
        except PermissionError:  # not root: a pipe then
            os.mkfifo(file)


def special_files() -> Iterator[Attack]:
    """What is no file, in every file's place."""
    names = [name for name in FILES if name not in (".hydra", "checkpoints")] + [".lock", "result.json.partial"]
    for name in names:
        yield Attack(f"special: {name} a pipe", partial(special, name=name, kind="pipe"))
    for number, name in enumerate(names):
        kind = ("socket", "zero", "full")[number % 3]
        yield Attack(f"special: {name} a {kind}", partial(special, name=name, kind=kind))
    for name in SWEEP_FILES:
        yield Attack(f"special: {name} a pipe", partial(special, name=name, kind="pipe"), on_sweep=True)

    def table(ground: Ground) -> None:
        os.mkfifo(ground.folder / "table.csv")
        change(ground, "data.path", str(ground.folder / "table.csv"))

    yield Attack("special: the table a pipe", table)


def addresses() -> Iterator[Attack]:
    """Values that fsspec, numpy and pyarrow would fetch."""

    def plant(ground: Ground, key: str, address: str) -> None:
        change(ground, key, address.replace("PORT", str(ground.port)))

    keys = ("data.path", "logger.tensorboard.save_dir", "callbacks.checkpoints.folder", "trainer.default_root_dir")
    schemes = (
        "http://127.0.0.1:PORT/x.csv", "ftp://127.0.0.1:PORT/x.csv", "reference::http://127.0.0.1:PORT/x.csv",
        "simplecache::ftp://127.0.0.1:PORT/x", "tcp://127.0.0.1:PORT/", "s3://x/y", "file:///etc/hostname",
    )  # fmt: skip
    for number, scheme in enumerate(schemes):
        for key in (keys[number % 4], keys[(number + 1) % 4]):
            yield Attack(f"addresses: {scheme} as {key}", partial(plant, key=key, address=scheme))


def sealed(content: bytes) -> bytes:
    """Returns a zip file with our checksum at its end: it vouches for the bits, for nobody's intent."""
    import hashlib

    content = content[:-2] + COMMENT_LENGTH.to_bytes(2, "little")
    return content + CHECKSUM + hashlib.sha256(content).hexdigest().encode()


def both(ground: Ground, content: bytes) -> None:
    """Makes it the content of both checkpoints."""
    for name in ("last", "best"):
        replace(ground, f"checkpoints/{name}.ckpt", content)


def sizes() -> Iterator[Attack]:
    """Files that are huge, deep or long."""
    deep, digits = "[" * 100_000, "9" * 400
    yield Attack("sizes: JSON 100,000 deep", partial(replace, name="result.json", content=f'{{"status": {deep}'))
    yield Attack("sizes: JSON closed", partial(replace, name="result.json", content=deep + "]" * 100_000))
    result = '{{"status": "completed", "monitor": "val/loss", "objective": {}, "seconds": {}}}'
    for number in (digits, "1" * 5000, f"{digits}.0", "1e999", "-1e999"):
        content = result.format(number, number)
        yield Attack(
            f"sizes: a loss of {len(number)} digits, {number[:6]}",
            partial(replace, name="result.json", content=content),
        )
    yield Attack("sizes: a 3 MB result", partial(replace, name="result.json", content=" " * 3 * 2**20))
    for name in ("config", "hydra", "overrides"):
        content = "a: 1\n" * 400_000
        yield Attack(f"sizes: a 2 MB {name}.yaml", partial(replace, name=f".hydra/{name}.yaml", content=content))
        yield Attack(f"sizes: a deep {name}.yaml", partial(replace, name=f".hydra/{name}.yaml", content="[" * 5000))
    many = json.dumps({"status": "completed", "monitor": "m", "metrics": {f"tag{i}": i for i in range(30_000)}})
    yield Attack("sizes: 30,000 metrics", partial(replace, name="result.json", content=many))
    overrides = "".join(f"- a{i}=1\n" for i in range(30_000))
    yield Attack("sizes: 30,000 overrides", partial(replace, name=".hydra/overrides.yaml", content=overrides))

    def sparse(ground: Ground, name: str, head: bytes = b"") -> None:
        with (ground.folder / name).open("wb") as stream:
            stream.write(head)
            stream.truncate(10 * 2**30)
        if name.startswith("table"):
            change(ground, "data.path", str(ground.folder / name))

    for name in ("table.csv", "table.parquet", "result.json", ".hydra/config.yaml", "checkpoints/last.ckpt"):
        yield Attack(f"sizes: 10 GB of nothing as {name}", partial(sparse, name=name))
    yield Attack("sizes: 10 GB of events", lambda ground: sparse(ground, "events.out.tfevents.9.x"))
    yield Attack("sizes: a header, then 10 GB", partial(sparse, name="table.csv", head=b"a,progression\n1,2\n"))

    def bomb(ground: Ground) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(2**28))
            archive.writestr("archive/version", "3\n")
        both(ground, sealed(buffer.getvalue()))

    yield Attack("sizes: a zip bomb", bomb)

    def parquet(ground: Ground) -> None:
        rows = pyarrow.table({name: np.zeros(2**24, dtype=np.int8) for name in ("a", "progression")})
        with pyarrow.parquet.ParquetWriter(ground.folder / "table.parquet", rows.schema) as writer:
            for _ in range(20):  # 5 GB in float64
                writer.write_table(rows)
        change(ground, "data.path", str(ground.folder / "table.parquet"))

    yield Attack("sizes: a Parquet bomb", parquet)

    def weights(ground: Ground) -> None:
        checkpoint = load_checkpoint(ground.folder / "checkpoints" / "last.ckpt")
        checkpoint["state_dict"] = {name: torch.zeros(1).expand(2**40) for name in checkpoint["state_dict"]}
        for name in ("last", "best"):
            write_checkpoint(checkpoint, ground.folder / "checkpoints" / f"{name}.ckpt")

    yield Attack("sizes: 4 TB of one zero", weights)
    for key, value in {"trainer.max_epochs": "9" * 400, "data.batch_size": 10**30, "lr": 1e308, "seed": -1}.items():
        yield Attack(f"sizes: {key}", partial(change, keys=key, value=int(value) if key.endswith("s") else value))  # type: ignore[call-overload]


def types() -> Iterator[Attack]:
    """Values of another type than a run writes."""
    good = {"status": "completed", "monitor": "val/loss", "objective": 0.5, "learning_rate": 0.04}
    odd: dict[str, Any] = {
        "seconds": None, "verdict": [], "evidence": "x", "metrics": {"val/loss": "x"}, "overrides": "lr",
        "learning_rate": [1], "error": [], "versions": None, "monitor": {}, "mode": "sideways", "status": [],
        "num_optimizer_steps": "many", "objective": True, "unheard_of": 1, "suggested_learning_rate": -1e308,
        "sharpness": "NaN", "largest_stable_learning_rate": 0, "critical_learning_rate": -1,
    }  # fmt: skip
    for key, value in odd.items():
        content = json.dumps(good | {key: value})
        yield Attack(f"types: {key} {value!r} in a result", partial(replace, name="result.json", content=content))
    for content in ("null", "[]", "0", '"completed"', "", "NaN", f'{{"status": {LONE_SURROGATE}}}', "\xff\xfe"):
        yield Attack(f"types: result {content!r}", partial(replace, name="result.json", content=content))
        yield Attack(f"types: config {content!r}", partial(replace, name=".hydra/config.yaml", content=content))
    for content in (
        "null",
        "[]",
        "hydra: []",
        "hydra: {overrides: {task: 3}}",
        "hydra: {sweeper: {params: [1]}}",
        "\t",
    ):
        yield Attack(f"types: hydra {content!r}", partial(replace, name=".hydra/hydra.yaml", content=content))
        plant = partial(replace, name="multirun.yaml", content=content)
        yield Attack(f"types: multirun {content!r}", plant, on_sweep=True)
    for content in ("{}", "- {a: b}", "- null", "x", "- [a]"):
        yield Attack(f"types: overrides {content!r}", partial(replace, name=".hydra/overrides.yaml", content=content))
    for key in ("trainer", "model", "data", "callbacks", "logger", "optimizer", "monitor", "lr", "device"):
        for value in ([None, [], "x"], [3, {}, True])[len(key) % 2]:
            yield Attack(f"types: {key} {value!r}", partial(change, keys=key, value=value))

    def spoil(ground: Ground, key: str, value: Any) -> None:
        for name in ("last", "best"):
            file = ground.folder / "checkpoints" / f"{name}.ckpt"
            checkpoint = load_checkpoint(file)
            node: Any = checkpoint
            *parents, last = key.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is ...:
                node.pop(last, None)
            else:
                node[last] = value
            write_checkpoint(checkpoint, file)

    state = ("state_dict", "progress", "loops", "optimizer_states", "callbacks", "global_step", "lr_schedulers",
             "progress.model", "progress.processes", "progress.event_files", "progress.metrics", "progress.settings",
             "progress.batch", "progress.seconds", "progress.optimizers", "TableData")  # fmt: skip
    for number, key in enumerate(state):
        values = (..., None, [], "x", -1, {"../../outside/file.txt": 0}, {"a": {"b": [1]}})  # type: ignore[var-annotated]
        for value in (values[number % 7], values[(number + 3) % 7]):
            yield Attack(f"types: checkpoint {key} {value!r}", partial(spoil, key=key, value=value))


def texts() -> Iterator[Attack]:
    """Names and values that steer a terminal, a page or a table program."""
    for what, text in {"escape": ESCAPE, "markup": MARKUP, "formula": FORMULA, "turn": "\u202etxt.exe"}.items():
        result = {"status": "completed", "objective": 0.5, "monitor": text, "metrics": {text: 1.0}, "verdict": text,
                  "overrides": [f"lr={text}", text], "device": text}  # fmt: skip
        yield Attack(f"texts: {what} in a result", partial(replace, name="result.json", content=json.dumps(result)))
        failed = {"status": "failed", "error": {"type": text, "message": text}}
        yield Attack(f"texts: {what} in an error", partial(replace, name="result.json", content=json.dumps(failed)))
        overrides = json.dumps([f"lr={text}", f"{text}=1"])
        yield Attack(f"texts: {what} in overrides", partial(replace, name=".hydra/overrides.yaml", content=overrides))
        for key in ("model._target_", "data.target", "data.path", "monitor", f"{text.replace('.', '')}"):
            yield Attack(f"texts: {what} as {key[:20]!r}", partial(change, keys=key, value=text))

    def folder(ground: Ground, name: bytes) -> None:
        shutil.copytree(os.fsencode(_file(ground, "job")), os.path.join(os.fsencode(ground.folder), name))  # type: ignore[type-var,arg-type]  # noqa: PTH118

    names = (b"caf\xe9", ESCAPE.replace("/", "").encode(), b"=HYPERLINK(1)", b"<script>", b"-rf", b"a\nb", b"x" * 250)
    for name in names:
        yield Attack(f"texts: a job called {name[:20]!r}", partial(folder, name=name), on_sweep=True)

    def file(ground: Ground, name: bytes) -> None:
        Path(os.fsdecode(os.path.join(os.fsencode(ground.folder), name))).write_bytes(b"x")  # noqa: PTH118

    for name in (b"events.out.tfevents.\xff", b"\x1b[2J", b"caf\xe9.ckpt"):
        yield Attack(f"texts: a file called {name!r}", partial(file, name=name), dashboard=True)


def tags() -> Iterator[Attack]:
    """YAML that would make objects, or grow."""
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    contents = (
        "!!python/object/apply:os.system [CODE]", "a: !!python/name:os.system", "a: !!binary aGVsbG8=",
        "a: !!python/object/new:evil.Model []", "a: !evil x", "a: &x 1\nb: *x", laughs, "<<: {a: 1}\n", "? [a]\n: b",
        "a: 1\n---\nb: 2", "%YAML 9.9\n---\na: 1", "a: 2001-01-01", "? {a: b}\n: c", "a: &a [*a]",
    )  # fmt: skip

    def plant(ground: Ground, name: str, content: str) -> None:
        replace(ground, name, content.replace("CODE", repr(ground.touch)))

    for number, content in enumerate(contents):
        for name in ("config", ("hydra", "overrides")[number % 2]):
            attack = partial(plant, name=f".hydra/{name}.yaml", content=content)
            yield Attack(f"tags: {content[:30]!r} in {name}", attack)


def pickles() -> Iterator[Attack]:
    """Checkpoints that would run code when they are unpickled."""

    def plant(ground: Ground, how: str) -> None:
        evil = {"state_dict": Snap(ground.touch), "progress": Snap(ground.touch)}
        buffer = io.BytesIO()
        if how == "sealed":
            torch.save(evil, buffer)
            both(ground, sealed(buffer.getvalue()))
        elif how == "zip":
            torch.save(evil, buffer)
            both(ground, buffer.getvalue())
        elif how == "legacy":
            torch.save(evil, buffer, _use_new_zipfile_serialization=False)
            both(ground, buffer.getvalue())
        elif how == "plain":
            both(ground, pickle.dumps(evil))
        else:
            checkpoint = load_checkpoint(ground.folder / "checkpoints" / "last.ckpt")
            checkpoint["callbacks" if how == "in callbacks" else "loops"] = Snap(ground.touch)
            for name in ("last", "best"):
                write_checkpoint(checkpoint, ground.folder / "checkpoints" / f"{name}.ckpt")

    for how in ("sealed", "zip", "legacy", "plain", "in callbacks", "in loops"):
        yield Attack(f"pickles: {how}", partial(plant, how=how))
    for content in (b"", b"PK\x05\x06" + bytes(18), b"\x80\x04.", bytes(200)):
        yield Attack(f"pickles: {content[:8]!r}", lambda ground, content=content: both(ground, content))  # type: ignore[misc]
        yield Attack(f"pickles: {content[:8]!r} sealed", lambda ground, content=content: both(ground, sealed(content)))  # type: ignore[misc]


def record(data: bytes) -> bytes:
    """Returns data as an event file holds them, whatever they are."""
    length = len(data).to_bytes(8, "little")
    checksums = [masked_checksum(part).to_bytes(4, "little") for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def events() -> Iterator[Attack]:
    """Event files that are none, or that say too much."""

    def plant(ground: Ground, content: bytes, name: str = "events.out.tfevents.9.x") -> None:
        replace(ground, name, content)

    text = Summary.Value(tag=MARKUP, simple_value=1.0)
    told = Event(step=1, summary=Summary(value=[text, Summary.Value(tag="val/loss", simple_value=float("nan"))]))
    contents = {
        "bad protocol buffer": record(b"\xff" * 40),
        "half a record": record(b"x" * 40)[:20],
        "endless length": b"\xff" * 8 + bytes(40),
        "random": Random(0).randbytes(4096),
        "markup": record(told.SerializeToString()),
        "greatest step": record(Event(step=2**63 - 1, summary=told.summary).SerializeToString()),
        "negative step": record(Event(step=-(2**63), summary=told.summary).SerializeToString()),
        "many": record(told.SerializeToString()) * 20_000,
        "a file version": record(Event(file_version="x" * 1000).SerializeToString()),
    }
    for what, content in contents.items():
        yield Attack(f"events: {what}", partial(plant, content=content), dashboard=True)
    yield Attack("events: a folder", lambda ground: (ground.folder / "events.out.tfevents.9.x").mkdir(), dashboard=True)
