"""Objects: no box to four per image, found by a score, a center and a size in each cell of a grid."""

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, launch


def images_with_boxes(count: int, seed: int):
    """Yield images of 32x32 with their boxes: rows of center x, center y, width and height, in pixels."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        image = 0.3 * torch.rand(1, 32, 32, generator=draw)
        sizes = torch.randint(4, 11, (int(torch.randint(5, (), generator=draw)), 2), generator=draw)
        corners = (torch.rand(sizes.shape, generator=draw) * (32 - sizes)).long()
        for x, y, width, height in torch.cat((corners, sizes), dim=1).tolist():
            image[0, y : y + height, x : x + width] += 0.5
        yield {"image": image, "boxes": torch.cat((corners + sizes / 2, sizes), dim=1)}


def num_found(boxes, wanted):
    """Return how many wanted boxes have more than half of their union with a box in common."""
    (low, high), (its_low, its_high) = ((b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2) for b in (boxes, wanted))
    common = (torch.min(high[:, None], its_high) - torch.max(low[:, None], its_low)).clamp(min=0).prod(dim=2)
    hits = common > 0.5 * (boxes[:, None, 2:].prod(dim=2) + wanted[:, 2:].prod(dim=1) - common)
    return torch.min(hits.any(dim=0).sum(), hits.any(dim=1).sum())  # no box is found twice, none finds two


class ObjectsRecipe(Recipe):
    """Find bright boxes."""

    def datasets(self):
        return {"train": list(images_with_boxes(2000, seed=1)), "eval": list(images_with_boxes(300, seed=2))}

    def model(self):
        sizes = (1, 32, 2), (32, 64, 2), (64, 64, 1)
        layers = [layer for a, b, stride in sizes for layer in (nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU())]
        return nn.Sequential(*layers, nn.Conv2d(64, 5, 3, padding=1))

    def collate(self, samples, seeds):
        image_of = [number for number, one in enumerate(samples) for _ in one["boxes"]]  # the image of each box
        inputs, boxes = torch.stack([one["image"] for one in samples]), torch.cat([one["boxes"] for one in samples])
        return {"inputs": inputs, "boxes": boxes, "image_of": torch.tensor(image_of, dtype=torch.long)}

    def num_targets(self, batch):
        return {"scores": 64 * len(batch["inputs"]), "boxes": len(batch["boxes"])}

    def forward(self, model, batch):
        cells = model(batch["inputs"]).movedim(1, 3)
        middles = 4 * torch.stack(torch.meshgrid(*2 * [torch.arange(8) + 0.5], indexing="xy"), dim=2).to(cells)
        return cells[..., 0], torch.cat((middles + cells[..., 1:3], 7 + cells[..., 3:]), dim=3)

    def loss(self, outputs, batch):
        scores, boxes = outputs
        x, y = (batch["boxes"][:, :2] / 4).long().unbind(1)
        there = torch.zeros_like(scores).index_put((batch["image_of"], y, x), scores.new_ones(()))
        off = F.smooth_l1_loss(boxes[batch["image_of"], y, x], batch["boxes"], reduction="sum")
        return {"scores": F.binary_cross_entropy_with_logits(scores, there, reduction="sum"), "boxes": off}

    def update_metrics(self, metrics, outputs, batch):
        for number, (scores, boxes) in enumerate(zip(*outputs, strict=True)):
            boxes, wanted = boxes[scores > 0], batch["boxes"][batch["image_of"] == number]
            self.log("box_f1", 2 * num_found(boxes, wanted), len(boxes) + len(wanted))


if __name__ == "__main__":
    launch(ObjectsRecipe)
