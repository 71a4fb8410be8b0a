"""Public libraries, those of them that are installed: small models from a configuration, nothing is downloaded."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foreign.peer import NUM_CLASSES, NUM_FEATURES, NUM_TOKENS, Peer, images, imports, network, tokens
from foreign.supervised import Classifier, Regressor

SMALL = {"vocab_size": NUM_TOKENS, "num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}

if imports("transformers"):
    import transformers

    class LanguageModel(Peer):
        """Learns to say its input."""

        data = staticmethod(tokens)

        def make(self) -> nn.Module:
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=NUM_TOKENS, n_embd=8, n_layer=1, n_head=2, n_positions=8)
            )

        def __init__(self) -> None:
            super().__init__()
            self.model = self.make()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch[0], labels=batch[0]).loss

    class Bert(LanguageModel):
        """BERT, with dropout."""

        def make(self) -> nn.Module:
            return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=8))

    class Llama(LanguageModel):
        """Llama."""

        def make(self) -> nn.Module:
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=8))


if imports("timm", "torchvision"):
    import timm

    class Timm(Classifier):
        """A residual network."""

        data = staticmethod(images)

        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("test_resnet", in_chans=1, num_classes=NUM_CLASSES)


if imports("lightly", "torchvision"):
    from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class LightlyMoCo(Peer):
        """MoCo, as lightly's own example writes it."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.backbone_momentum = network(8), network(8)
            deactivate_requires_grad(self.backbone_momentum)
            self.criterion: nn.Module = NTXentLoss(memory_bank_size=(16, 8))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            one, other = (batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2))
            return self.compare(self.backbone(one), self.backbone_momentum(other).detach())

        def compare(self, query: Tensor, key: Tensor) -> Any:
            return self.criterion(query, key)

    class LightlyBYOL(LightlyMoCo):
        """BYOL."""

        def __init__(self) -> None:
            super().__init__()
            self.criterion = NegativeCosineSimilarity()

    class LightlyDINO(LightlyMoCo):
        """DINO, whose criterion keeps a centre."""

        def __init__(self) -> None:
            super().__init__()
            self.criterion = DINOLoss(output_dim=8)

        def compare(self, query: Tensor, key: Tensor) -> Any:
            return self.criterion([key], [query, query.flip(0)], epoch=self.current_epoch)


if imports("peft"):
    import peft

    class Peft(Regressor):
        """LoRA."""

        def __init__(self) -> None:
            super().__init__()
            self.net = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["0"], lora_dropout=0.1))


if imports("torch_geometric"):
    from torch_geometric.nn import GATConv, GCNConv

    class Geometric(Peer):
        """Two layers of a graph network."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(NUM_FEATURES, 6), GATConv(6, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            edges = torch.randint(len(batch[0]), (2, 20))
            return mse_loss(self.second(self.first(batch[0], edges).relu(), edges), batch[1])


if imports("schedulefree"):
    import schedulefree

    class TrainsAndEvaluates(Regressor):
        """Tells its optimizer when it is evaluated, as schedulefree asks for."""

        def configure_optimizers(self) -> Any:
            return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.01)

        def on_train_epoch_start(self) -> None:
            self.optimizers().train()

        def on_validation_epoch_start(self) -> None:
            self.optimizers().eval()

        def on_validation_epoch_end(self) -> None:
            self.optimizers().train()
