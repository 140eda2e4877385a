"""Option names of other trainers, and the corresponding options here."""

import re
from collections.abc import Collection
from difflib import get_close_matches

from shardlaunch.launcher.option_fields import flag

_GLOBAL = (
    "did you mean --global-batch-size? It is the number of samples per optimizer step, over all ranks and "
    "accumulation steps"
)
_MICRO = (
    "did you mean --micro-batch-size? --global-batch-size is the number of samples per optimizer step over all ranks; "
    "the two determine gradient accumulation"
)
_ACCUMULATION = (
    "not an option here; gradient accumulation follows from --global-batch-size, --micro-batch-size and the number "
    "of ranks"
)
_NUMBER_OF_RANKS = (
    "not an option of recipes; set the number of ranks with `shardlaunch run RECIPE --ranks N`, torchrun or "
    "accelerate launch"
)
_SEVERAL_MACHINES = "not an option of recipes; for several machines use torchrun --nnodes N or accelerate launch"
_ALWAYS = "not an option here; a run always trains, and evaluates if there is evaluation data"
_EVALUATE = "did you mean --eval-every N (steps)? By default, every epoch ends with an evaluation"
_EVAL_MICRO = "did you mean --eval-micro-batch-size? Without, an evaluation uses --micro-batch-size"
_SAVE = "did you mean --save-every N (steps)? A run always saves at its end"
_LOG = "did you mean --log-every (metrics.jsonl) or --track-every (trackers)?"
_WARM_UP = "did you mean --warmup-steps or --warmup-ratio (a fraction of all steps)?"
_CLIP = "did you mean --max-grad-norm?"
_BETAS = "did you mean --betas BETA1 BETA2?"
_EMA = "did you mean --ema? It is the decay of the average of the weights, such as 0.999; --eval-ema evaluates it"
_RESUME = "did you mean --resume? By default, the same command resumes from the newest checkpoint in its --output-dir"

_ADVICE = {
    "learning_rate": "did you mean --lr?",
    "batch_size": _GLOBAL,
    "train_batch_size": _GLOBAL,
    "per_device_train_batch_size": _MICRO,
    "per_gpu_train_batch_size": _MICRO,
    "train_micro_batch_size_per_gpu": _MICRO,
    "per_device_eval_batch_size": _EVAL_MICRO,
    "eval_batch_size": _EVAL_MICRO,
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "num_train_epochs": "did you mean --epochs?",
    "num_epochs": "did you mean --epochs?",
    "max_epochs": "did you mean --epochs?",
    "bf16": "did you mean --precision bf16?",
    "fp16": "did you mean --precision fp16?",
    "mixed_precision": "did you mean --precision?",
    "evaluation_strategy": _EVALUATE,
    "eval_strategy": _EVALUATE,
    "eval_steps": _EVALUATE,
    "val_check_interval": _EVALUATE,
    "save_strategy": _SAVE,
    "save_steps": _SAVE,
    "checkpointing_steps": _SAVE,
    "save_total_limit": "did you mean --keep?",
    "load_best_model_at_end": "no such option here; --save-on-best, the default, keeps the best checkpoint",
    "logging_steps": _LOG,
    "log_every_n_steps": _LOG,
    "logging_dir": "did you mean --output-dir? TensorBoard files are written below it",
    "report_to": "did you mean --tracker?",
    "with_tracking": "did you mean --tracker?",
    "warmup": _WARM_UP,
    "num_warmup_steps": _WARM_UP,
    "lr_scheduler_type": "did you mean --schedule?",
    "lr_scheduler": "did you mean --schedule?",
    "scheduler": "did you mean --schedule?",
    "optim": "did you mean --optimizer?",
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "adam_epsilon": "did you mean --eps?",
    "gradient_clipping": _CLIP,
    "gradient_clip_val": _CLIP,
    "clip_grad_norm": _CLIP,
    "ema_decay": _EMA,
    "model_ema": _EMA,
    "model_ema_decay": _EMA,
    "use_ema": _EMA,
    "dataloader_num_workers": "did you mean --num-workers?",
    "dataset": "did you mean --data?",
    "dataset_name": "did you mean --data?",
    "train_file": "did you mean --data? It may be a folder with train and test files",
    "model_name": "did you mean --model?",
    "model_name_or_path": "did you mean --model?",
    "max_seq_length": "did you mean --max-length?",
    "max_seq_len": "did you mean --max-length?",
    "sampler": "did you mean --order? A recipe may have an order() of its own",
    "shuffle": "did you mean --order? Training samples are shuffled, unless it is sequential",
    "use_peft": "did you mean --lora-rank N? It is what turns adapters on",
    "lora_r": "did you mean --lora-rank?",
    "lora_target_modules": "did you mean --lora-targets?",
    "target_modules": "did you mean --lora-targets?",
    "lora_modules_to_save": "not an option here; with --lora-rank, newly initialized layers are trained as a whole",
    "use_rslora": "did you mean --rslora?",
    "use_dora": "did you mean --dora?",
    "load_in_8bit": "did you mean --lora-base-bits? It is for the frozen base of --lora-rank, and 8",
    "load_in_4bit": "did you mean --lora-base-bits? It is for the frozen base of --lora-rank, and 8, not fewer",
    "torch_compile": "did you mean --compile?",
    "fsdp": "did you mean --strategy fsdp2?",
    "deepspeed": "did you mean --strategy zero1, zero2 or zero3?",
    "resume_from_checkpoint": _RESUME,
    "ckpt_path": _RESUME,
    "overwrite_output_dir": "not an option here; a run in an existing --output-dir is resumed, a new run needs another",
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "devices": _NUMBER_OF_RANKS,
    "gpus": _NUMBER_OF_RANKS,
    "num_processes": _NUMBER_OF_RANKS,
    "nproc_per_node": _NUMBER_OF_RANKS,
    "ranks": _NUMBER_OF_RANKS,
    "num_nodes": _SEVERAL_MACHINES,
    "num_machines": _SEVERAL_MACHINES,
    "nnodes": _SEVERAL_MACHINES,
    "local_rank": "not an option here; the launcher sets each rank's number in environment variables",
}


def advice(name: str, known: Collection[str]) -> str:
    """Return advice on an unknown option `name` (with underscores); `known` are the recipe's option names."""
    text = _ADVICE.get(name, "")
    if text and ("did you mean" not in text or _flags(text)[0].replace("-", "_") in known):
        return text
    near = [flag(match) for match in get_close_matches(name, known, n=2)]
    return f"unknown option; did you mean {' or '.join(near)}?" if near else "unknown option; --help lists all"


def _flags(text: str) -> list[str]:
    return re.findall(r"--([a-z0-9-]+)", text)
