"""Direct preference optimization: which of two texts is preferred, beside what the language model was before."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch

VOCABULARY, LENGTH = 12, 8


@dataclass(kw_only=True)
class PreferenceOptions(Options):
    """Options of the preference tuning."""

    global_batch_size: int = 32
    micro_batch_size: int = 8
    beta: float = 0.1
    """How much the model may differ from the reference."""


class Texts(nn.Module):
    """A language model: the logits of each token's successor."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.layers(self.tokens(tokens))[0])


class PreferenceRecipe(Recipe):
    """Prefer texts whose tokens rise."""

    options: PreferenceOptions

    def datasets(self):
        generator = torch.Generator().manual_seed(0)
        some = torch.randint(VOCABULARY, (600, LENGTH), generator=generator)
        rising = some.sort(dim=1).values
        return {
            "train": TensorData(chosen=rising[:500], rejected=some[:500]),
            "eval": TensorData(chosen=rising[500:], rejected=some[500:]),
        }

    def model(self):
        return Texts()

    def references(self):
        return {"before": self.model()}  # draws the same weights as the trained one; else load the same checkpoint

    def num_targets(self, batch):
        return len(batch["chosen"])

    def forward(self, model, batch):
        both = torch.cat((batch["chosen"], batch["rejected"]))
        return _log_likelihoods(model, both) - _log_likelihoods(self.reference["before"], both)

    def loss(self, outputs, batch):
        chosen, rejected = outputs.chunk(2)
        margin = self.options.beta * (chosen - rejected)
        self.log("preferred", (margin > 0).sum(), len(margin))
        return -F.logsigmoid(margin).sum()


def _log_likelihoods(model, tokens):
    logits = model(tokens[:, :-1]).log_softmax(dim=-1)
    return logits.gather(2, tokens[:, 1:, None]).sum(dim=(1, 2))


if __name__ == "__main__":
    launch(PreferenceRecipe)
