from functools import partial

from lightning import Trainer, seed_everything
from torch.optim import SGD

from template.your_task.data import YourTaskData
from template.your_task.model import YourTaskModel


def test_training_lowers_the_loss_of_rows_that_were_not_trained_on() -> None:
    seed_everything(0, verbose=False)
    data = YourTaskData(batch_size=32, seed=0)
    constant_rate = {"scheduler": None, "interval": "epoch", "monitor": "val/loss"}
    module = YourTaskModel(data.num_features, 16, partial(SGD, lr=0.1), constant_rate)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=5, accelerator="cpu", **quiet)
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/loss"] < 0.5 * before
