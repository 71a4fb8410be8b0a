"""Language, graphs and sets: recurrent nets, attention, embeddings, sparse neighbourhoods."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from foreign.peer import NUM_FEATURES, NUM_TOKENS, Peer, rows, tokens


class LongShortTermMemory(Peer):
    """Predicts the next token."""

    data = staticmethod(tokens)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 6)
        self.body: nn.Module = nn.LSTM(6, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, NUM_TOKENS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words))[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0][:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


class CarriesHiddenState(Peer):
    """Truncated backpropagation through time: the state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(NUM_FEATURES, 5), nn.Linear(5, 1)
        self.hidden: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output, hidden = self.body(batch[0], self.hidden)
        self.hidden = hidden.detach()
        return mse_loss(self.head(output), batch[1])

    def on_train_epoch_end(self) -> None:
        self.hidden = None


class TruncatedTime(CarriesHiddenState):
    """Takes several optimizer steps a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        for part in zip(*(each.split(3) for each in batch), strict=True):
            loss = super().training_step(part, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class TransformerEncoder(LongShortTermMemory):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, nhead=2, dim_feedforward=8, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words)))


class CausalAttention(LongShortTermMemory):
    """As GPT: causal attention, and the embedding is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 18)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embedding(words)
        query, key, value = self.body(embedded).chunk(3, dim=-1)
        return self.head(embedded + scaled_dot_product_attention(query, key, value, is_causal=True))


class SparseEmbedding(LongShortTermMemory):
    """All gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, NUM_TOKENS, sparse=True)
        self.body, self.head = nn.Identity(), nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        return self.embedding(words)


class SparseAndDense(LongShortTermMemory):
    """Sparse gradients beside dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 6, sparse=True)


class BagOfWords(LongShortTermMemory):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.EmbeddingBag(NUM_TOKENS, 6, mode="mean")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self.head(self.body(batch[0][:, :-1])), batch[0][:, -1])


class GraphConvolution(Peer):
    """Neighbours by a sparse adjacency, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(NUM_FEATURES, 5), nn.Linear(5, 1)])
        places = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])
        self.register_buffer("adjacency", torch.sparse_coo_tensor(places, torch.ones(8), (8, 8)).coalesce())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        adjacency = self.adjacency.to(batch[0].dtype)
        with torch.autocast("cpu", enabled=False):
            hidden = torch.sparse.mm(adjacency, self.layers[0](batch[0])).relu()
            return mse_loss(self.layers[1](torch.sparse.mm(adjacency, hidden)), batch[1])


class MessagePassing(Peer):
    """Messages along edges, added up at their ends."""

    data = staticmethod(rows)

    def __init__(self) -> None:
        super().__init__()
        self.message, self.head = nn.Linear(2 * NUM_FEATURES, 5), nn.Linear(5, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        start, end = torch.randint(len(batch[0]), (2, 20))
        messages = self.message(torch.cat([batch[0][start], batch[0][end]], dim=1)).relu()
        gathered = messages.new_zeros(len(batch[0]), 5).index_add(0, end, messages)
        return mse_loss(self.head(gathered), batch[1])
