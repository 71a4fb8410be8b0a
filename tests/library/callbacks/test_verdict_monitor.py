import contextlib
import functools
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from downslope.callbacks import DivergenceError, FlightRecorder, SharpnessMonitor, VerdictMonitor
from downslope.verdict import EvidenceCollector
from template.regression.data import TableData
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression
from tests.conftest import Outcome, only_run, read_events, read_json
from tests.library.callbacks.test_every_setting import SETTINGS
from tests.library.callbacks.test_every_setting import fit as fit_setting

LIMIT = 0.24610  # 2/λ of the diabetes table's training rows


class Line(ManualLinearRegression):
    """The manual cycle, which the mistakes below spoil."""

    def __init__(self, num_features: int, learning_rate: float) -> None:
        optimizer = functools.partial(SGD, lr=learning_rate)
        super().__init__(num_features, optimizer, {"scheduler": None, "interval": "epoch", "monitor": None})


class NoZeroGrad(Line):
    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]
        return loss

    def on_validation_model_zero_grad(self) -> None: ...


class Summed(Line):
    def training_step(self, batch: Any) -> Tensor:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        losses = [self.loss(part) for part in zip(*(rows.chunk(6) for rows in batch), strict=True)]
        for loss in losses:
            self.manual_backward(loss)
        optimizer.step()
        return torch.stack(losses).mean().detach()


class Frozen(Line):
    def __init__(self, num_features: int, learning_rate: float) -> None:
        super().__init__(num_features, learning_rate)
        self.linear.weight.requires_grad_(False)


class Journal(Callback):
    """Every word, and the first loss that is not finite."""

    def __init__(self, monitor: VerdictMonitor) -> None:
        self.monitor, self.words, self.overflowed = monitor, {}, math.inf

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if self.monitor.verdict:
            self.words.setdefault(self.monitor.verdict.word, trainer.global_step)
        if not torch.isfinite(outputs["loss"]):
            self.overflowed = min(self.overflowed, trainer.global_step)


def fit(
    kind: type[Line], learning_rate: float, num_epochs: int, batch_size: int = 354, **settings: Any
) -> tuple[VerdictMonitor, Journal, Line]:
    """A line on the diabetes table's training rows, all at once where nothing else is said."""
    seed_everything(0, verbose=False)
    data = TableData("pkg://template.regression/diabetes.csv", "progression", batch_size=batch_size, seed=0)
    module = kind(data.num_features, learning_rate)
    monitor = VerdictMonitor()
    journal = Journal(monitor)
    trainer = Trainer(
        **{
            "max_epochs": num_epochs,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "callbacks": [monitor, journal],
            **settings,
        }
    )
    trainer.fit(module, datamodule=data)
    return monitor, journal, module


@pytest.mark.parametrize(
    ("kind", "share", "words", "hint"),
    [
        (Line, 0.5, {"converged"}, None),
        (Line, 0.001, {"too_slow"}, None),
        (Line, 1.2, {"too_large"}, None),
        (NoZeroGrad, 0.1, {"oscillating", "diverging"}, "zero_grad() missing"),
        (Summed, 0.5, {"diverging", "non_finite"}, "about 6 × that of the loss"),
        (Frozen, 0.5, {"stalled"}, "`linear.weight` is frozen"),
    ],
)
def test_a_real_run_gets_its_word_and_its_mistake_a_name(
    kind: type[Line], share: float, words: set[str], hint: str | None
) -> None:
    monitor, _, _ = fit(kind, share * LIMIT, 60)
    assert monitor.verdict
    assert monitor.verdict.word in words
    assert (not monitor.verdict.hints) if hint is None else any(hint in each for each in monitor.verdict.hints)


@pytest.mark.parametrize("share", [1.01, 1.5])
def test_diverging_is_said_long_before_the_loss_overflows(share: float) -> None:
    monitor, journal, _ = fit(Line, share * LIMIT, 320)
    assert monitor.first_diverging_step is not None
    assert monitor.first_diverging_step <= 50
    assert journal.overflowed > 2 * monitor.first_diverging_step


def test_it_sees_what_the_collector_sees_in_a_bare_loop() -> None:
    monitor, _, module = fit(Line, 0.3 * LIMIT, 50)
    assert monitor.verdict
    seed_everything(0, verbose=False)
    data = TableData("pkg://template.regression/diabetes.csv", "progression", batch_size=354, seed=0)
    data.setup("fit")
    bare = Line(data.num_features, 0.3 * LIMIT)
    optimizer = SGD(bare.parameters(), lr=0.3 * LIMIT)
    collector = EvidenceCollector(optimizer, {}, full_batch=True, last_step=50)
    batches = data.train_dataloader()
    for epoch in range(50):
        batches.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for features, target in batches:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(bare(features), target)
            loss.backward()
            optimizer.step()
            collector.add_step()
            collector.add_loss(loss)
            if collector.is_due:
                evidence = collector.evidence()
    assert torch.equal(bare.linear.weight, module.linear.weight)
    for name in ("loss", "gradient_norm", "gradient_ratio", "gradient_cosine", "curvature", "update_ratio"):
        assert monitor.verdict.figures[name] == getattr(evidence, name), name


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_observing_changes_no_bit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, settings = SETTINGS[name]
    monitor = VerdictMonitor(every_n_steps=3, window=3)
    watched = fit_setting(kind, [monitor], False, **settings())
    alone = fit_setting(kind, [], False, **settings())
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))
    assert monitor.verdict
    assert monitor.verdict.word not in ("diverging", "too_large", "non_finite")
    assert "is off" not in caplog.text


class Automatic(LinearRegression):
    def __init__(self, num_features: int, learning_rate: float, weight_decay: float = 0.0) -> None:
        optimizer = functools.partial(SGD, lr=learning_rate, weight_decay=weight_decay)
        super().__init__(num_features, optimizer, {"scheduler": None, "interval": "epoch", "monitor": None})


class Searching(LinearRegression):
    def __init__(self, num_features: int, learning_rate: float) -> None:
        optimizer = functools.partial(LBFGS, lr=learning_rate)
        super().__init__(num_features, optimizer, {"scheduler": None, "interval": "epoch", "monitor": None})


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_accumulation_longer_than_an_epoch_is_a_warning_and_its_loss_is_that_of_the_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor, _, _ = fit(Automatic, 0.01, 20)  # type: ignore[arg-type]
    accumulated, _, _ = fit(Automatic, 0.01, 20, accumulate_grad_batches=100)  # type: ignore[arg-type]
    assert monitor.verdict
    assert accumulated.verdict
    first = monitor.verdict.figures["first_loss"]
    assert accumulated.verdict.figures["first_loss"] == pytest.approx(first, rel=1e-5)
    assert accumulated.verdict.hints == ()
    assert accumulated.verdict.figures["gradient_excess"] == pytest.approx(1 / 100, rel=1e-3)
    said = "accumulate_grad_batches=100 exceeds the 1 of an epoch: each step is 1/100 of their mean gradient."
    assert [each for each in caplog.messages if "accumulate_grad_batches" in each] == [said]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("batch_size", [354, 32])
def test_a_loss_that_an_optimizer_asks_for_many_times_a_step_is_one_loss(batch_size: int) -> None:
    monitor, _, _ = fit(Searching, 0.1, 4, batch_size)  # type: ignore[arg-type]  # no Line
    assert monitor.verdict
    assert monitor.verdict.hints == ()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_weight_decay_is_judged_against_its_own_optimum() -> None:
    monitor, _, module = fit(functools.partial(Automatic, weight_decay=0.5), 0.2, 200)  # type: ignore[arg-type]
    line = module.least_squares()
    assert monitor.verdict
    assert line
    assert monitor.verdict.word == "converged"
    assert "closed form" in monitor.verdict.sentence
    assert monitor.verdict.figures["sharpness"] == pytest.approx(line.sharpness + 0.5)  # H + wI
    weights = torch.cat([each.detach().flatten() for each in module.parameters()]).double()
    torch.testing.assert_close(weights, line.decayed(0.5).parameters, atol=1e-3, rtol=1e-2)


class Network(LightningModule):
    """Somebody else's."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.learning_rate = learning_rate

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=self.learning_rate)


def network(folder: Path, learning_rate: float, *callbacks: Callback, kind: type[Network] = Network) -> None:
    seed_everything(1, verbose=False)
    generator = torch.Generator().manual_seed(2)
    rows = TensorDataset(torch.randn(32, 3, generator=generator), torch.randn(32, 1, generator=generator))
    trainer = Trainer(
        max_epochs=40,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(kind(learning_rate), DataLoader(rows, batch_size=32))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_tensorboard_gets_the_sentence_when_the_word_changes(tmp_path: Path) -> None:
    monitor = VerdictMonitor(every_n_steps=10)
    network(tmp_path, 0.02, monitor, SharpnessMonitor(every_n_steps=10))
    events = read_events(tmp_path)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("verdict/text_summary")]
    words = [text.partition(":")[0] for text in texts]
    assert monitor.verdict
    assert words[-1] == monitor.verdict.word
    assert all(one != other for one, other in itertools.pairwise(words))
    assert monitor.verdict.suggestion.learning_rate == pytest.approx(1 / monitor.verdict.figures["sharpness"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_fault_of_its_own_turns_it_off_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(EvidenceCollector, "add_step", fail)
    monitor = VerdictMonitor()
    network(tmp_path, 0.02, monitor)
    assert monitor.verdict is None
    assert caplog.text.count("VerdictMonitor is off from here on: RuntimeError: unforeseen") == 1


class Breaks(Network):
    """Sound for 35 steps, three after a judgement; then its loss is NaN, or 1e9 times itself."""

    factor = math.nan

    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch) * (self.factor if self.global_step == 35 else 1.0)


class Explodes(Breaks):
    factor = 1e9


@pytest.mark.parametrize(("kind", "word"), [(Breaks, "non_finite"), (Explodes, "diverging")])
@pytest.mark.parametrize("on_divergence", ["stop", "raise"])
@pytest.mark.filterwarnings("ignore:Diverged", "ignore:.*does not have many workers")
def test_what_a_flight_recorder_ends_is_judged_to_the_end_and_printed(
    kind: type[Network], word: str, on_divergence: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor, recorder = VerdictMonitor(), FlightRecorder(folder=str(tmp_path), on_divergence=on_divergence)
    with contextlib.suppress(DivergenceError):
        network(tmp_path, 0.02, monitor, recorder, kind=kind)
    assert recorder.flight_record
    assert recorder.flight_record.offending.step == 35
    assert monitor.verdict
    assert monitor.verdict.word == word
    assert capsys.readouterr().out.count(f"Verdict: {monitor.verdict.sentence}\n") == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_that_ends_between_two_judgements_is_judged_by_what_was_seen_before(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 35

    monitor = VerdictMonitor()
    network(tmp_path, 0.02, monitor, Stops())
    assert monitor.verdict
    assert monitor.verdict.figures["step"] == 35
    assert monitor.verdict.word == "converging"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("prints", [True, False])
def test_the_last_sentence_is_printed_once_unless_it_shall_not(
    prints: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = VerdictMonitor(print_verdict=prints)
    network(tmp_path, 0.02, monitor)
    assert monitor.verdict
    out = capsys.readouterr().out
    assert out == (f"Verdict: {monitor.verdict.sentence}\n" if prints else "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must"),
        ({"window": 2}, "`window` must be a whole number of at least 3"),
        ({"thresholds": {"tolerence": 1.0}}, "`thresholds` must be among tolerance"),
        ({"thresholds": {"growth": 0.5}}, "`growth` must"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerdictMonitor(**settings)


def test_the_console_and_the_result_say_it(script: Any, tmp_path: Path) -> None:
    outcome: Outcome = script("train", "data.batch_size=1000", "lr=0.002", "trainer.max_epochs=60", "model=manual")
    result = read_json(only_run(tmp_path))
    assert outcome.code == 0
    assert result["verdict"] == "too_slow"
    assert "  verdict   too_slow: " in outcome.out
    assert (
        result["evidence"]["sentence"].split() == outcome.out.partition("  verdict   ")[2].partition("\n\n")[0].split()
    )
    suggested = result["suggested_learning_rate"]
    assert result["evidence"]["condition_number"] > 100
    assert "s1 − s2" in result["evidence"]["sentence"]
    again = f"scripts/train.py data.batch_size=1000 trainer.max_epochs=60 model=manual lr={suggested:.3g}"
    assert again in outcome.out
    after = script("train", "data.batch_size=1000", f"lr={suggested:.3g}", "trainer.max_epochs=60", "model=manual")
    assert "verdict   conver" in after.out


@pytest.mark.filterwarnings("ignore:Diverged")
def test_a_diverged_run_says_so_with_a_rate_to_try(script: Any, tmp_path: Path) -> None:
    outcome: Outcome = script("train", "experiment=diverge", "trainer.max_epochs=100")
    result = read_json(only_run(tmp_path))
    assert outcome.code == 3
    assert result["status"] == "diverged"
    assert result["verdict"] in ("too_large", "non_finite")
    assert result["suggested_learning_rate"] < LIMIT
    assert "Try" in outcome.out


def test_a_resumed_run_remembers_its_beginning(tmp_path: Path) -> None:
    data = TableData("pkg://template.regression/diabetes.csv", "progression", batch_size=354, seed=0)

    def trainer(num_epochs: int, monitor: VerdictMonitor) -> Trainer:
        return Trainer(
            max_epochs=num_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[monitor, FlightRecorder(folder=str(tmp_path))],
        )

    first, second = VerdictMonitor(), VerdictMonitor()
    begun = trainer(40, first)
    begun.fit(Line(data.num_features, 0.01), datamodule=data)
    begun.save_checkpoint(tmp_path / "a.ckpt")
    trainer(80, second).fit(
        Line(data.num_features, 0.01), datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert first.verdict
    assert second.verdict
    for name in ("first_loss", "first_excess", "first_gradient_norm", "best_learning_rate"):
        assert second.verdict.figures[name] == first.verdict.figures[name]


@pytest.mark.parametrize(
    ("start", "most"),
    [
        (["lr=0.0615"], 2),  # noise holds it: then along a cosine
        pytest.param(["lr=0.0001", "trainer.max_epochs=60"], 3, marks=pytest.mark.slow),
        pytest.param(["lr=1.5", "trainer.max_epochs=60", "data.batch_size=1000"], 3, marks=pytest.mark.slow),
        pytest.param(["experiment=digits", "lr=0.0001", "trainer.max_epochs=6"], 3, marks=pytest.mark.slow),
        pytest.param(["experiment=digits", "lr=20", "trainer.max_epochs=6"], 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Diverged")
def test_following_the_printed_command_comes_to_rest(script: Any, tmp_path: Path, start: list[str], most: int) -> None:
    commands = [start]
    while len(commands) <= most:
        script("train", *commands[-1], f"hydra.run.dir=run{len(commands)}", "~callbacks.pictures")
        override = read_json(tmp_path / f"run{len(commands)}")["evidence"]["try"]
        if not override:
            break
        key = override.partition("=")[0]
        commands.append([*(each for each in commands[-1] if each.partition("=")[0] != key), override])
    first, last = (read_json(tmp_path / f"run{number}") for number in (1, len(commands)))
    assert 1 < len(commands) <= most
    assert last["metrics"]["val/loss"] <= 1.01 * first["metrics"].get("val/loss", math.inf)
    assert last["verdict"] in ("converging", "converged", "oscillating")


def test_evidence_in_another_layout_is_one_line_and_the_run_is_judged_from_there_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = TableData("pkg://template.regression/diabetes.csv", "progression", batch_size=50, seed=0)
    weights = []
    for layout in ("ours", "another"):
        for num_epochs in (2, 4):
            monitor = VerdictMonitor()
            trainer = Trainer(
                max_epochs=num_epochs,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                callbacks=[monitor],
            )
            line = Line(data.num_features, 0.01)
            torch.nn.init.zeros_(line.linear.weight)
            torch.nn.init.zeros_(line.linear.bias)
            file = tmp_path / "a.ckpt" if num_epochs == 4 else None
            trainer.fit(line, datamodule=data, ckpt_path=file, weights_only=True)
            if num_epochs == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                if layout == "another":
                    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
                    del checkpoint["callbacks"]["VerdictMonitor"]["evidence"]["losses"]
                    torch.save(checkpoint, tmp_path / "a.ckpt")
        weights.append(line.linear.weight.detach())
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.count("VerdictMonitor starts over: its state in the checkpoint has a different layout.") == 1
    assert monitor.verdict
    assert not monitor.is_off
    assert torch.equal(*weights)
