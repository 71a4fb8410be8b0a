"""What arrives at each optimizer step: gradient norms, gradients, parameters, learning rate."""

import itertools
from collections.abc import Iterator

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from downslope.gradients.norms import norms, total_norm
from downslope.tensorboard import write_scalars


class GradientMonitor(Callback):
    """Logs the gradient that arrives at the optimizer step, before clipping by the Trainer.

    At step t (t optimizer steps taken before it) it writes, of the parameters θₜ that the optimizer holds and
    of their accumulated gradient: `gradient_norm/total`, `gradient_norm/<parameter>`, the histogram
    `gradient/<parameter>`, element by element `gradient_value/<parameter>[i,j]` and
    `parameter_value/<parameter>[i,j]`, and `learning_rate/<optimizer>`. A parameter without a gradient is
    passed over.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        histogram_every_n_steps: The same for histograms, which are dearer; a multiple of `every_n_steps`.
        max_scalar_elements: Parameters of at most so many elements are also written element by element.
    """

    def __init__(
        self, every_n_steps: int = 50, histogram_every_n_steps: int = 100, max_scalar_elements: int = 16
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("histogram_every_n_steps", histogram_every_n_steps),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value}.")
        self.every_n_steps = every_n_steps
        self.histogram_every_n_steps = histogram_every_n_steps
        self.max_scalar_elements = max_scalar_elements

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or not trainer.loggers or not trainer.is_global_zero:
            return
        named = list(_with_gradient(pl_module, optimizer))
        if not named:
            return
        values = _learning_rates(optimizer)
        gradient_norms = norms([gradient for _, _, gradient in named])
        total, *each = torch.cat([total_norm(gradient_norms)[None], gradient_norms]).tolist()
        values["gradient_norm/total"] = total
        for (name, parameter, gradient), norm in zip(named, each, strict=True):
            values[f"gradient_norm/{name}"] = norm
            if parameter.numel() <= self.max_scalar_elements:
                values.update(_elements(f"gradient_value/{name}", gradient))
                values.update(_elements(f"parameter_value/{name}", parameter))
        write_scalars(trainer, values, step)
        if step % self.histogram_every_n_steps == 0:
            _write_histograms(trainer, {f"gradient/{name}": gradient for name, _, gradient in named}, step)


def _with_gradient(module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """The parameters that this optimizer will step, by name: another's may hold stale gradients."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and id(parameter) in held:
            yield name, parameter, parameter.grad


def _learning_rates(optimizer: Optimizer) -> dict[str, float]:
    name = f"learning_rate/{type(optimizer).__name__}"
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {name: float(groups[0]["lr"])}
    return {f"{name}/{index}": float(group["lr"]) for index, group in enumerate(groups)}


def _elements(tag: str, tensor: Tensor) -> dict[str, float]:
    """One value an element, named by its indices, [0,3]."""
    indices = itertools.product(*map(range, tensor.shape))
    values = tensor.detach().flatten().tolist()
    return {f"{tag}[{','.join(map(str, index))}]": value for index, value in zip(indices, values, strict=True)}


def _write_histograms(trainer: Trainer, tensors: dict[str, Tensor], step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, tensor in tensors.items():
                # TensorBoard refuses a histogram of nothing finite, and would end the training with it.
                if bool(torch.isfinite(tensor).any()):
                    logger.experiment.add_histogram(tag, tensor.detach().float().cpu(), step)
