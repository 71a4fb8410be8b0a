"""Modules whose `training_step` leaves more behind than a gradient: a second call of it would be noticed."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, normalize

from foreign.peer import NUM_FEATURES, Peer, network
from foreign.supervised import Regressor


class MomentumContrast(Peer):
    """MoCo: the teacher follows in each step, and a queue of keys is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.student = network(4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.ones(16, 4) + torch.eye(16, 4), dim=1))

    def views(self, batch: Any) -> list[Tensor]:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2)]

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.follow()
        one, other = self.views(batch)
        query = normalize(self.student(one), dim=1)
        with torch.no_grad():
            key = normalize(self.teacher(other), dim=1)
        queue = self.queue.clone().type_as(query)
        logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue.T], dim=1)
        self.queue = torch.cat([key.type_as(self.queue), self.queue])[:16]
        return cross_entropy(logits / 0.2, torch.zeros(len(logits), dtype=torch.long))


class BootstrapYourOwnLatent(MomentumContrast):
    """BYOL: the teacher follows when the batch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = network(4, inputs=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, other = self.views(batch)
        with torch.no_grad():
            target = self.teacher(other)
        return -cosine_similarity(self.predictor(self.student(one)), target).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.follow()


class SelfDistillation(MomentumContrast):
    """DINO: a centre that moves in each step, and a temperature that is warmed up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.temperature = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.follow()
        self.temperature *= 0.99
        one, other = self.views(batch)
        with torch.no_grad():
            taught = self.teacher(other)
            target = ((taught - self.centre) / self.temperature).softmax(dim=1)
            self.centre.lerp_(taught.mean(dim=0).to(self.centre.dtype), 0.1)
        return -(target * self.student(one).log_softmax(dim=1)).sum(dim=1).mean()


class ContrastiveViews(MomentumContrast):
    """SimCLR, without a teacher."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        codes = normalize(self.student(torch.cat(self.views(batch))), dim=1)
        similar = (codes @ codes.T / 0.5).masked_fill(torch.eye(len(codes), dtype=torch.bool), -1e4)
        return cross_entropy(similar, torch.arange(len(codes)).roll(len(codes) // 2))


class BarlowTwins(MomentumContrast):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, other = [(code - code.mean(0)) / (code.std(0) + 1e-3) for code in map(self.student, self.views(batch))]
        return (one.T @ other / len(one) - torch.eye(4)).square().sum()


class QLearner(Peer):
    """DQN: it acts in an environment, remembers what came of that, and copies its target network now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = network(2), network(2).requires_grad_(False)
        self.memory: deque[tuple[Tensor, int, float, Tensor]] = deque(maxlen=30)
        self.state, self.total_reward = torch.zeros(NUM_FEATURES), 0.0

    def act(self) -> None:
        with torch.no_grad():
            values = self.net(self.state.to(self.net[0].weight.dtype))
        action = random.randrange(2) if random.random() < 0.3 else int(values.argmax())
        after = (self.state + (2 * action - 1) * 0.1 + 0.01 * torch.randn(NUM_FEATURES)).clamp(-1, 1)
        reward = -float(after.abs().sum())
        self.memory.append((self.state, action, reward, after))
        self.state, self.total_reward = after, self.total_reward + reward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(4):
            self.act()
        if batch_idx % 3 == 0:
            self.target.load_state_dict(self.net.state_dict())
        before, actions, rewards, after = zip(*random.sample(list(self.memory), 4), strict=True)
        kind = self.net[0].weight.dtype
        chosen = self.net(torch.stack(before).to(kind))[torch.arange(4), torch.tensor(actions)]
        best = self.target(torch.stack(after).to(kind)).max(dim=1).values
        self.log("reward", self.total_reward)
        return mse_loss(chosen, torch.tensor(rewards, dtype=kind) + 0.9 * best)


class PolicyGradient(Peer):
    """REINFORCE with a baseline that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.baseline = network(3), 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        policy = Categorical(logits=self.net(batch[0]).float())
        actions = policy.sample()
        rewards = -(actions - 1 - batch[1][:, 0].float()).square()
        advantage = rewards - self.baseline
        self.baseline = 0.9 * self.baseline + 0.1 * float(rewards.mean())
        return -(policy.log_prob(actions) * advantage).mean()


class MetaLearner(Regressor):
    """MAML: a step inside the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weights = dict(self.net.named_parameters())
        (support, query), (wanted, truth) = (each.chunk(2) for each in batch)
        inner = mse_loss(functional_call(self.net, weights, (support,)), wanted)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = {name: each - 0.1 * slope for (name, each), slope in zip(weights.items(), slopes, strict=True)}
        return mse_loss(functional_call(self.net, moved, (query,)), truth)


class PhysicsInformed(Regressor):
    """The loss holds derivatives by the inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0].requires_grad_()
        output = self(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return (slope + output).square().mean()


class OwnTorchGenerator(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator().manual_seed(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.randn(batch[0].shape, generator=self.source).type_as(batch[0])
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


class OwnNumpyGenerator(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.source = np.random.default_rng(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0] * self.source.normal(), batch[1]], batch_idx)


class OwnPythonGenerator(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.source = random.Random(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0] * self.source.random(), batch[1]], batch_idx) * random.random()


class Counts(Regressor):
    """Anneals by a counter of its own."""

    num_calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.num_calls += 1
        return super().training_step(batch, batch_idx) * min(1.0, self.num_calls / 5)


class Collects(Regressor):
    """Lightning's own pattern for what is made of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.outputs).mean())
        self.log("number", float(len(self.outputs)))
        self.outputs.clear()


class KeepsTheGraph(Regressor):
    """An attribute holds a tensor that gradients flow through, into the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        smoothness = (loss - self.last.detach()).square()
        self.last = loss
        return loss + 0.1 * smoothness


class MakesCentroids(Regressor):
    """Vector quantization: a codebook that is no parameter moves with the data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.eye(NUM_FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, codebook = batch[0], self.codebook.type_as(batch[0])
        nearest = torch.cdist(inputs, codebook).argmin(dim=1)
        self.codebook.index_copy_(0, nearest[:1], inputs[:1].detach().to(self.codebook.dtype))
        return super().training_step([inputs + (codebook[nearest] - inputs).detach(), batch[1]], batch_idx)


class Grows(Regressor):
    """Gets another layer in its second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: nn.Module = nn.Identity()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.extra = nn.Linear(NUM_FEATURES, NUM_FEATURES).to(self.net[0].weight.dtype)
            self.optimizers().add_param_group({"params": list(self.extra.parameters())})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([self.extra(batch[0]), batch[1]], batch_idx)


class Thaws(BaseFinetuning):
    """Freezes the first layer for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Finetuned(Regressor):
    def configure_callbacks(self) -> Any:
        return [Thaws()]

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([each for each in self.parameters() if each.requires_grad])


class FreezesBetween(Regressor):
    """Sets `requires_grad` by hand, at every epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch % 2 == 1)
