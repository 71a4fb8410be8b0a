import inspect

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from downslope.launch.quick_steps import NoProfiler, quicken


class Counted(LightningModule):
    """A module whose step takes the number of its batch, as Lightning finds out by its signature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.numbers: list[int] = []

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.numbers.append(number)
        return self.net(batch).mean()  # type: ignore[no-any-return]  # a call of a module has no type

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def trainer(**settings: object) -> Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | settings
    return Trainer(enable_progress_bar=False, enable_model_summary=False, **options)  # type: ignore[arg-type]  # of many types


def test_a_step_gets_what_it_asks_for() -> None:
    quick, module = trainer(), Counted()
    before = inspect.signature(Counted.training_step)
    quicken(quick, module)
    assert type(quick.profiler) is NoProfiler  # type: ignore[attr-defined]  # a connector sets it
    assert inspect.signature(Counted.training_step) == before
    quick.fit(module, DataLoader(torch.ones(3, 1), batch_size=1))  # type: ignore[arg-type]  # rows are a dataset
    assert module.numbers == [0, 1, 2]


def test_a_profiler_that_somebody_chose_stays() -> None:
    chosen = SimpleProfiler()
    quick, module = trainer(profiler=chosen), Counted()
    quicken(quick, module)
    assert quick.profiler is chosen  # type: ignore[attr-defined]  # a connector sets it
    quick.fit(module, DataLoader(torch.ones(1, 1), batch_size=1))  # type: ignore[arg-type]  # rows are a dataset
    assert any("training_step" in action for action in chosen.recorded_durations)
