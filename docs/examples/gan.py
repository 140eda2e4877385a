"""A Wasserstein GAN with gradient penalty: two optimizers, five updates of the critic per update of the generator."""

from dataclasses import dataclass

import torch
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


@dataclass(kw_only=True)
class GanOptions(Options):
    """Options of the GAN."""

    lr: float = 1e-3
    betas: tuple[float, float] | None = (0.0, 0.9)
    global_batch_size: int = 64
    micro_batch_size: int = 16
    critic_updates: int = 5
    """Updates of the critic per update of the generator."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""


class Gan(nn.Module):
    """Both networks, called as one: under FSDP2 a part may be in shards until the model is called."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        self.critic = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, noise=None, points=None):
        points = self.generator(noise) if points is None else points
        return points, self.critic(points)


class GanRecipe(Recipe):
    """Learn a ring of points in the plane."""

    options: GanOptions

    def datasets(self):
        angle = 2 * torch.pi * torch.rand(2000, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(points=torch.stack((angle.cos(), angle.sin()), dim=1))}

    def model(self):
        return Gan()

    def num_targets(self, batch):
        return len(batch["points"])

    def optimizer(self, parameters):
        of = {"generator": [], "critic": []}
        for name, parameter in parameters:
            of[name.partition(".")[0]].append((name, parameter))
        return {name: super(GanRecipe, self).optimizer(its) for name, its in of.items()}

    def step(self, step):
        def critic_loss(model, batch):
            real = batch["points"]
            fake, of_fake = model(noise=torch.randn(len(real), 8, device=real.device))
            mixed = real + torch.rand(len(real), 1, device=real.device) * (fake.detach() - real)
            between = mixed.requires_grad_()
            slope = step.gradient_of(model(points=between)[1], between).norm(dim=1)
            penalty = self.options.penalty * (slope - 1).square().sum()
            return {"distance": (of_fake - model(points=real)[1]).sum(), "penalty": penalty}

        for _ in range(self.options.critic_updates):
            step.update(critic_loss, optimizer="critic")
        step.update(self._generator_loss, optimizer="generator")

    def _generator_loss(self, model, batch):
        noise = torch.randn(len(batch["points"]), 8, device=batch["points"].device)
        return -model(noise=noise)[1].sum()


if __name__ == "__main__":
    launch(GanRecipe)
