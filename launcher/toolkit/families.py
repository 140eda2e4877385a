"""Model types that are compared with plain transformers, and what each needs: docs/families.md lists the results."""

from typing import Any

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current

# Text classifiers whose result for a text does not depend on padding. Each one is tested (tests/families).
CLASSIFIERS = (
    *("albert", "arcee", "bart", "bert", "big_bird", "biogpt", "bloom", "camembert", "ctrl"),
    *("data2vec-text", "deberta", "deberta-v2", "deepseek_v3", "diffllama", "distilbert", "doge", "electra", "ernie"),
    *("esm", "eurobert", "exaone4", "falcon", "flaubert", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "gte", "helium", "ibert", "jamba", "jetmoe"),
    *("jina_embeddings_v3", "llama", "longformer", "mbart", "megatron-bert", "ministral", "mistral", "mixtral"),
    *("modernbert", "modernbert-decoder", "mpnet", "mpt", "mt5", "mvp", "nemotron", "nomic_bert"),
    *("olmo", "olmo2", "olmo3", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "plbart", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "seed_oss", "smollm3", "squeezebert", "stablelm", "starcoder2", "t5", "umt5", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet"),
)
PADDED_LEFT = ("xlnet",)  # they read the last position, so padding comes before the text

# Causal language models of which packed documents stay separate, by position ids that restart. Others accept position
# ids but attend to earlier documents (OPT, BLOOM), or carry a state across them (Jamba).
PACKING_MODELS = (
    *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj"),
    *("granite", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2"),
    *("qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)
# Causal language models of which a token's result does not depend on later tokens, so that rows can be padded.
ROW_MODELS = (
    *("afmoe", "apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere2_moe", "ctrl", "cwm"),
    *("deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon"),
    *("falcon_h1", "falcon_mamba", "flex_olmo", "glm4_moe", "gpt_neo", "gpt_oss", "granitemoe", "granitemoehybrid"),
    *("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "lfm2_moe"),
    *("llama4_text", "mamba", "mamba2", "minimax", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron"),
    *("olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
    *("recurrent_gemma", "rwkv", "solar_open", "vaultgemma", "xglm", "zamba2"),
)

# Encoder-decoders of which padding changes no result. NLLB-MoE shares its experts' room among all rows of a batch.
TRANSLATORS = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian", "mbart"),
    *("mt5", "mvp", "pegasus", "pegasus_x", "plbart", "switch_transformers", "t5", "umt5"),
)


_GROW = "Make room with resize_token_embeddings(len(tokenizer)) of transformers, and save both anew"


def require_no_effect_of_padding(
    config: Any, known: tuple[str, ...], *, source: str, longest: int, micro_batch_size: int
) -> None:
    """Raise UserError when a text's result may depend on the texts beside it in a micro-batch.

    `known`: model types whose result does not; `longest`: most tokens of a text.
    """
    if micro_batch_size == 1:
        return
    kind = config.model_type
    if kind not in known:
        raise UserError(
            f"--model {source}: model type {kind!r} is not among the {len(known)} families that are known to give a "
            f"text the same result whatever padding it gets; use --micro-batch-size 1, which needs none, or another "
            f"--model"
        )
    if getattr(config, "attention_type", "") == "block_sparse":  # BigBird chooses by the padded length
        whole = (5 + 2 * config.num_random_blocks) * config.block_size
        if longest > whole:
            raise UserError(
                f"--model {source}: its block-sparse attention replaces the full one beyond {whole} tokens, padding "
                f"counted, so that a text's result depends on the texts beside it; use at most {whole} tokens, "
                f'--micro-batch-size 1, or "attention_type": "original_full" in its config.json'
            )


def require_vocabulary(tokenizer: Any, config: Any, *, source: str, hint: str = _GROW) -> None:
    """Raise UserError when a tokenizer has more tokens than the model; `hint` says what to do."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise UserError(f"--model {source}: it has {size:,} tokens, but the tokenizer has {len(tokenizer):,}. {hint}")


def prepare_padding(tokenizer: Any, config: Any, *, source: str) -> None:
    """Set a tokenizer's padding token and side to what the model needs, and note what was changed for the run's start.

    The model finds its last token by its own padding token, so that one is used; without one, a tokenizer's padding
    token, or else its end-of-text token. Raises UserError when there is none.
    """
    before, side = tokenizer.pad_token, tokenizer.padding_side
    wanted = config.pad_token_id
    if wanted is None:
        wanted = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if wanted is None:
        raise UserError(f"--model {source}: its tokenizer has no padding token and no end-of-text token; add one")
    if wanted != tokenizer.pad_token_id:
        token = tokenizer.convert_ids_to_tokens(wanted) if 0 <= wanted < len(tokenizer) else None
        if token is None:
            raise UserError(
                f"--model {source}: its config.json has the pad_token_id {wanted}, which the tokenizer does not have; "
                f"correct one of the two"
            )
        tokenizer.pad_token = token
    config.pad_token_id = wanted
    tokenizer.padding_side = "left" if config.model_type in PADDED_LEFT else "right"
    changes = [f"padding token {before!r} -> {tokenizer.pad_token!r}"] if tokenizer.pad_token != before else []
    if tokenizer.padding_side != side:
        changes.append(f"padding on the {tokenizer.padding_side}")
    if changes:
        current().remarks.append(f"tokenizer: {', '.join(changes)}")
