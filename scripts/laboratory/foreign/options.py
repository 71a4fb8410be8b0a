"""Trainer options, each as a change of the matrix's plain Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

Settings = dict[str, Any]  # of a Trainer; `callbacks` and `logger` are added to those of the matrix

OPTIONS: dict[str, Callable[[Path], Settings]] = {
    "plain": lambda folder: {},
    "accumulate": lambda folder: {"accumulate_grad_batches": 3},
    "clip-norm": lambda folder: {"gradient_clip_val": 0.05},
    "clip-value": lambda folder: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "clip-accumulate": lambda folder: {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "bf16-mixed": lambda folder: {"precision": "bf16-mixed"},
    "bf16-mixed-clip": lambda folder: {"precision": "bf16-mixed", "gradient_clip_val": 0.05},
    "64-true": lambda folder: {"precision": "64-true"},
    "bf16-true": lambda folder: {"precision": "bf16-true"},
    "max-steps": lambda folder: {"max_steps": 5, "max_epochs": -1},
    "min-steps": lambda folder: {"min_steps": 15, "max_epochs": 1},
    "limit-batches": lambda folder: {"limit_train_batches": 0.5, "limit_val_batches": 1},
    "no-validation": lambda folder: {"limit_val_batches": 0},
    "val-check-interval": lambda folder: {"val_check_interval": 0.5, "num_sanity_val_steps": 2},
    "check-every-2": lambda folder: {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "overfit": lambda folder: {"overfit_batches": 1},
    "detect-anomaly": lambda folder: {"detect_anomaly": True},
    "deterministic": lambda folder: {"deterministic": True},
    "fast-dev-run": lambda folder: {"fast_dev_run": 3},
    "reload-loaders": lambda folder: {"reload_dataloaders_every_n_epochs": 1},
    "inference-mode-off": lambda folder: {"inference_mode": False},
    "no-distributed-sampler": lambda folder: {"use_distributed_sampler": False},
    "weight-averaging": lambda folder: {
        "max_epochs": 3,
        "callbacks": [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    },
    "accumulation-schedule": lambda folder: {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
    "early-stopping": lambda folder: {
        "max_epochs": 4,
        "callbacks": [EarlyStopping("val/loss", min_delta=10.0, patience=1)],
    },
    "checkpoints": lambda folder: {
        "enable_checkpointing": True,
        "callbacks": [
            ModelCheckpoint(folder / "checkpoints", monitor="val/loss", every_n_train_steps=3, save_last=True)
        ],
    },
    "profiler": lambda folder: {"profiler": "simple"},
    "tensorboard": lambda folder: {"logger": [TensorBoardLogger(folder)], "log_every_n_steps": 1},
    "two-loggers": lambda folder: {"logger": [CSVLogger(folder)], "callbacks": [LearningRateMonitor()]},
    "no-logger": lambda folder: {"logger": False},
    "barebones": lambda folder: {"barebones": True},
}
