"""Options of LoRA: train small adapters beside the frozen layers of a pretrained model."""

from dataclasses import dataclass, fields
from importlib.util import find_spec

from shardlaunch.errors import UserError
from shardlaunch.launcher.option_fields import flag, option


@dataclass(kw_only=True)
class LoraOptions:
    """Options of LoRA."""

    lora_rank: int = option(0, minimum=0)
    """Train LoRA adapters of this rank (by peft), newly initialized layers and the head of a classifier, and nothing
    else of a pretrained transformers model (0: train the model)."""
    lora_alpha: int = option(0, minimum=0)
    """An adapter counts alpha / rank times (0: twice the rank)."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the ends of their names, such as q_proj v_proj (default: all but the output
    layer)."""
    lora_dropout: float = option(0.0, minimum=0, below=1)
    """Dropout of an adapter's inputs."""
    rslora: bool = False
    """Let an adapter count alpha / sqrt(rank) times (rank-stabilized LoRA)."""
    dora: bool = False
    """Also train the length of each row of the adapted weight matrices (DoRA)."""
    lora_base_bits: int = 0
    """Keep the frozen linear layers of the base model in 8 bits: a quarter of their memory (0: as they are)."""

    def __post_init__(self) -> None:
        if not self.lora_rank:
            idle = [flag(f.name) for f in fields(LoraOptions) if getattr(self, f.name) != f.default]
            if idle:
                raise UserError(f"{idle[0]}: has no effect without adapters; set --lora-rank, such as 16, or remove it")
        if self.lora_base_bits not in (0, 8):
            raise UserError(
                f"--lora-base-bits {self.lora_base_bits}: must be 0 or 8; fewer bits need kernels of their own, which "
                f"not every device has"
            )


def require_peft(options: LoraOptions) -> None:
    """Raise UserError when peft, which --lora-rank needs, is not installed."""
    if options.lora_rank and find_spec("peft") is None:
        raise UserError('--lora-rank: peft is not installed: pip install "shardlaunch[lora]"')
