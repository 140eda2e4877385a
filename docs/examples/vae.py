"""A variational autoencoder: two losses, each a mean over something else, of which one comes in gradually."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


@dataclass(kw_only=True)
class VaeOptions(Options):
    """Options of the autoencoder."""

    global_batch_size: int = 128
    micro_batch_size: int = 32
    latent: int = 4
    """Length of the code of an image."""
    anneal: float = 0.25
    """Part of the run in which the divergence gets its full weight."""


class Vae(nn.Module):
    """Encoder, a draw of the code, decoder."""

    def __init__(self, latent: int, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=-1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), mean, log_variance


class VaeRecipe(Recipe):
    """Learn small images: blurred squares."""

    options: VaeOptions

    def datasets(self):
        generator = torch.Generator().manual_seed(0)
        x, y, size = torch.rand(3, 1200, 1, 1, generator=generator)
        place = torch.linspace(0, 1, 8)
        inside = ((place[None, :, None] - x).abs() < size / 2 + 0.1) & ((place[None, None] - y).abs() < size / 2 + 0.1)
        images = F.avg_pool2d(inside.float()[:, None], 3, stride=1, padding=1).flatten(1)
        return {"train": TensorData(images=images[:1000]), "eval": TensorData(images=images[1000:])}

    def model(self):
        return Vae(self.options.latent)

    def num_targets(self, batch):
        return {"reconstruction": batch["images"].numel(), "divergence": len(batch["images"])}

    def forward(self, model, batch):
        return model(batch["images"])

    def loss(self, outputs, batch):
        decoded, mean, log_variance = outputs
        weight = 1e-2 * min(1.0, self.moment.progress / self.options.anneal)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        self.log("unweighted_divergence", divergence, len(mean))
        error = F.binary_cross_entropy_with_logits(decoded, batch["images"], reduction="sum")
        return {"reconstruction": error, "divergence": weight * divergence}


if __name__ == "__main__":
    launch(VaeRecipe)
