"""Folders of small pretrained models of sounds, with random weights, for tests."""

from pathlib import Path

import torch


def save_small_ast(folder: Path) -> None:
    """Write the model folder of a small Audio Spectrogram Transformer with random weights, for 56 frames of 16 mels."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ASTConfig(**sizes, num_mel_bins=16, max_length=56, patch_size=8, time_stride=8, frequency_stride=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=56, mean=-4.0, std=4.5).save_pretrained(folder)


def save_small_wav2vec2(folder: Path, *, is_masked: bool = False) -> None:
    """Write the model folder of a small wav2vec 2.0 with random weights; `is_masked`: as the larger ones have it."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 8, 4),
        conv_stride=(10, 8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        feat_extract_norm="layer" if is_masked else "group",
        do_stable_layer_norm=is_masked,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=is_masked).save_pretrained(folder)
