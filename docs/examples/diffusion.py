"""A diffusion model of small digits: noise and time are drawn per sample; digits are drawn at each evaluation."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

from shardlaunch import Recipe, launch

SIGNAL = torch.linspace(0.05, 1.5, 50).cos().square()  # how much of an image is left at each time


class Noised(Dataset):
    """Digits with noise; noise and time are drawn from the global generators, which are seeded per row."""

    def __init__(self, rows: slice) -> None:
        images, self.digits = (torch.tensor(part[rows]) for part in load_digits(return_X_y=True))
        self.images = images.float() / 8 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        time, noise = torch.randint(len(SIGNAL), ()), torch.randn(64)
        noisy = SIGNAL[time].sqrt() * self.images[index] + (1 - SIGNAL[time]).sqrt() * noise
        return {"noisy": noisy, "time": time, "digit": self.digits[index], "noise": noise}


class Denoiser(nn.Module):
    """The noise in images of known times and digits."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.times, self.digits = nn.Embedding(len(SIGNAL), width), nn.Embedding(10, width)
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 64)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, noisy, time, digit):
        hidden = self.first(noisy)
        for layer in self.middle:
            hidden = hidden + layer((hidden + self.times(time) + self.digits(digit)).relu())
        return self.last(hidden.relu())


class DiffusionRecipe(Recipe):
    """Draw digits."""

    def datasets(self):
        self.train = Noised(slice(0, 1400))
        return {"train": self.train, "eval": Noised(slice(1400, None))}

    def model(self):
        return Denoiser()

    def num_targets(self, batch):
        return batch["noise"].numel()

    def forward(self, model, batch):
        return model(batch["noisy"], batch["time"], batch["digit"])

    def loss(self, outputs, batch):
        return (outputs - batch["noise"]).square().sum()

    @torch.no_grad()
    def on_evaluation(self, event):
        """Draw ten of each digit, and count those that are nearest to a training image of that digit."""
        device = next(event.model.parameters()).device
        digits, images = torch.arange(100) % 10, torch.randn(100, 64)
        for time in range(len(SIGNAL) - 1, 0, -1):
            noise = event.model(*(part.to(device) for part in (images, torch.full((100,), time), digits))).cpu()
            clean = ((images - (1 - SIGNAL[time]).sqrt() * noise) / SIGNAL[time].sqrt()).clamp(-1, 1)
            images = SIGNAL[time - 1].sqrt() * clean + (1 - SIGNAL[time - 1]).sqrt() * torch.randn(100, 64)
        right = self.train.digits[torch.cdist(images, self.train.images).argmin(dim=1)] == digits
        event.say(f"{int(right.sum())} of 100 digits are nearest to an image of that digit")
        event.log_image("digits", images.reshape(10, 10, 8, 8).transpose(1, 2).reshape(80, 80).clamp(-1, 1) / 2 + 0.5)


if __name__ == "__main__":
    launch(DiffusionRecipe)
