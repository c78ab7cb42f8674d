"""A small classifier that knows nothing of evaluations, images in [0, 1], and a Trainer that leaves nothing behind."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CLASSES = 5


def pixels_and_target(n=48, seed=0):
    """Smooth coloured images in [0, 1], (n, 3, 12, 12), the class in the colour, with noise."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % CLASSES
    colours = torch.rand(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(n, 3, 12, 12, generator=generator)
    return 0.5 * colours[target] + 0.5 * noise, target


def normalise(pixels):
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def network(seed=0):
    """Convolution, batch norm, dropout, linear; trained for a moment so that attacks have something to break."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(72, CLASSES),
        )  # fmt: skip
        pixels, target = pixels_and_target(100, seed=3)
        optimiser = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(30):
            optimiser.zero_grad()
            F.cross_entropy(net(normalise(pixels)), target).backward()
            optimiser.step()
        optimiser.zero_grad()
    return net.eval()


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network().train()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(n=48, batch_size=16, seed=0, **kwargs):
    pixels, target = pixels_and_target(n, seed)
    return DataLoader(TensorDataset(normalise(pixels), target), batch_size=batch_size, **kwargs)


def trainer(*callbacks, **kwargs):
    defaults = {
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), enable_checkpointing=False, **(defaults | kwargs))
