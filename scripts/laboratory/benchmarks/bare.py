"""The yardstick of `benchmark.py startup`: the same training, by hand in plain PyTorch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

NUM_TRAINING_ROWS, NUM_VALIDATION_ROWS, NUM_FEATURES, BATCH_SIZE = (
    80,
    10,
    10,
    64,
)  # train.py's parts of 100 rows

torch.manual_seed(0)
features = torch.randn(NUM_TRAINING_ROWS + NUM_VALIDATION_ROWS, NUM_FEATURES)
target = features @ torch.randn(NUM_FEATURES) + 0.1 * torch.randn(len(features))
training_rows = TensorDataset(features[:NUM_TRAINING_ROWS], target[:NUM_TRAINING_ROWS])
validation_rows = TensorDataset(features[NUM_TRAINING_ROWS:], target[NUM_TRAINING_ROWS:])

model = nn.Linear(NUM_FEATURES, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
writer = SummaryWriter("outputs/bare")

for step, (inputs, outputs) in enumerate(DataLoader(training_rows, BATCH_SIZE, shuffle=True)):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs).squeeze(-1), outputs)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradient_norm = nn.utils.get_total_norm(gradients)
    optimizer.step()
    writer.add_scalar("train/loss", loss, step)
    writer.add_scalar("gradient_norm/total", gradient_norm, step)

with torch.no_grad():
    for inputs, outputs in DataLoader(validation_rows, BATCH_SIZE):
        writer.add_scalar("val/loss", nn.functional.mse_loss(model(inputs).squeeze(-1), outputs), step)
writer.close()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "outputs/bare/last.ckpt")
