"""A plain training script; the three lines that end in `# +` are all that growth adds.

python -m examples.three_lines

epoch  5: test accuracy 75.8 %, 502 parameters
epoch 10: test accuracy 88.9 %, 720 parameters
epoch 15: test accuracy 94.4 %, 967 parameters
epoch 20: test accuracy 96.4 %, 967 parameters
"""

import torch
from torch import nn
from torch.nn import functional as F

import fxgrow  # +
from examples.data import digits

torch.manual_seed(0)
torch.set_num_threads(1)
data = digits()
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True
)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

for epoch in range(20):
    if epoch in (5, 10):  # +
        model = fxgrow.grow(model, loader, budget="+50%", optimizer=optimizer, progress=False)  # +
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if epoch % 5 == 4:
        with torch.no_grad():
            accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean()
        size = sum(p.numel() for p in model.parameters())
        print(f"epoch {epoch + 1:2d}: test accuracy {100 * accuracy:.1f} %, {size} parameters")
