"""Tiny models of many families with random weights, and small tokenizers, as folders that transformers can load."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "d_head", "state_size", "moe_intermediate_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "num_experts_per_tok": 2,
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": None},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
# What a family needs besides SIZES; None: it does not know that size.
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "falcon": {"head_dim": None, "new_decoder_architecture": False},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "max_position_embeddings": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    },
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "modernbert-decoder": {"local_attention": 8},
    "nllb-moe": {"num_experts": 4, "expert_capacity": 64},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3_next": {
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "shared_expert_intermediate_size": 32},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xlnet": {"max_position_embeddings": None},
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8},
        **{"mamba_ngroups": 1, "chunk_size": 8},
    },
}
WORDS = [
    *("the", "a", "film", "dog", "cat", "house", "is", "was", "good", "bad", "long", "short", "very", "not", "and"),
    *("with", "in", "of", "red", "blue", "old", "new", "we", "it", "they"),
]


def save_tokenizer(folder: Path, *, kind: str, family: str = "") -> Any:
    """Write a tokenizer of words: `cls` frames texts as BERT does, `end` appends </s>, `plain` adds nothing.

    XLNet's pads on the left and has token types of its own.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate((*specials, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = {"cls": "<s> $A </s>", "end": "$A </s>", "plain": "$A"}[kind]
    more: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    if family == "xlnet":
        frame = "$A </s> <s>:2"
        more = {"padding_side": "left", "pad_token_type_id": 3}
    if kind == "cls" and family != "xlnet":
        more = {}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, vocabulary[token]) for token in specials]
    )
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    roles["sep_token"] = "</s>"
    if family == "gpt2":
        del roles["pad_token"]  # as that of GPT-2 itself
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **roles,
        **more,
    )
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, auto_class: Any, family: str, *, tokenizer: Any, **options: Any) -> None:
    """Write a tiny model of a family with random weights, the same at each call."""
    from transformers import CONFIG_MAPPING

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 0}
    if family == "gpt2":
        del tokens["pad_token_id"]
    sizes = {**SIZES, **tokens, "vocab_size": len(tokenizer), **EXTRAS.get(family, {}), **options}
    config = CONFIG_MAPPING[family](**{name: value for name, value in sizes.items() if value is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config)
        for parameter in model.parameters():  # so that no head is so small that a wrong input goes unseen
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
