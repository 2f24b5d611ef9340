"""What reads tokens: transformers, x_transformers, open_clip."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from architectures.images import from_module
from architectures.libraries import torchvision
from architectures.making import Architecture, Sample, ids, named, noise, ones, pictures, text, together

WORDS = 200


def hugging(kind: str, config: str, sample: Sample | None = None, **settings: Any) -> Architecture:
    """A model of transformers; without a sample it takes what a tokenizer gives."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        library = importlib.import_module("transformers")
        return getattr(library, kind)(getattr(library, config)(**settings)), sample or text(WORDS)

    return make


ENCODER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
"""As most encoders call their sizes."""

DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2}
"""As most decoders do; the cache of keys and values is an output, which is their default."""

PAIRED: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
"""As encoders with a decoder do."""

TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def labelled(sample: Sample, classes: int) -> Sample:
    """With labels among the inputs, so that a loss is the first output."""
    return lambda n: {**sample(n), "labels": torch.randint(classes, (n,))}


def clip() -> tuple[nn.Module, Sample]:
    """CLIP of transformers, both towers."""
    torchvision()
    library = importlib.import_module("transformers")
    config = library.CLIPConfig(
        text_config={**TOWER, "vocab_size": WORDS, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    inputs = named(input_ids=ids(WORDS), attention_mask=ones(16), pixel_values=pictures(32))
    return library.CLIPModel(config), inputs


def open_clip() -> tuple[nn.Module, Sample]:
    """CLIP of open_clip."""
    torchvision()
    library = importlib.import_module("open_clip.model")
    model = library.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": WORDS, "width": 64, "heads": 4, "layers": 2},
    )
    return model, together(pictures(32), ids(WORDS))


def decoder() -> tuple[nn.Module, Sample]:
    """A decoder of x_transformers."""
    library = importlib.import_module("x_transformers")
    layers = library.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True)
    return library.TransformerWrapper(num_tokens=WORDS, max_seq_len=32, attn_layers=layers), ids(WORDS)


def vision_transformer() -> tuple[nn.Module, Sample]:
    """A vision transformer of x_transformers."""
    library = importlib.import_module("x_transformers")
    layers = library.Encoder(dim=64, depth=2, heads=4, attn_dim_head=16)
    model = library.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)
    return model, pictures(32)


WITH_DECODER = named(input_ids=ids(WORDS), attention_mask=ones(16), decoder_input_ids=ids(WORDS, 8))

ARCHITECTURES: dict[str, Architecture] = {
    "hf/ALBERT (shared layers)": hugging("AlbertModel", "AlbertConfig", **ENCODER, embedding_size=32),
    "hf/BART": hugging("BartForConditionalGeneration", "BartConfig", WITH_DECODER, **PAIRED),
    "hf/BERT": hugging("BertForSequenceClassification", "BertConfig", **ENCODER),
    "hf/BERT (labels)": hugging(
        "BertForSequenceClassification", "BertConfig", labelled(text(WORDS), 3), **ENCODER, num_labels=3
    ),
    "hf/BLOOM": hugging("BloomForCausalLM", "BloomConfig", vocab_size=WORDS, hidden_size=64, n_layer=2, n_head=4),
    "hf/CLIP": clip,
    "hf/DeBERTa-v2": hugging(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "hf/DistilBERT": hugging(
        "DistilBertForMaskedLM", "DistilBertConfig", vocab_size=WORDS, dim=64, n_layers=2, n_heads=4, hidden_dim=128
    ),
    "hf/ELECTRA": hugging("ElectraForSequenceClassification", "ElectraConfig", **ENCODER, embedding_size=32),
    "hf/GPT-2 (Conv1D)": hugging(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=WORDS,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "hf/GPT-NeoX": hugging("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER),
    "hf/Gemma": hugging("GemmaForCausalLM", "GemmaConfig", **DECODER, head_dim=16),
    "hf/Llama (GQA)": hugging("LlamaForCausalLM", "LlamaConfig", **DECODER, use_cache=False),
    "hf/Mamba": hugging(
        "MambaForCausalLM",
        "MambaConfig",
        named(input_ids=ids(WORDS)),
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        use_cache=False,
    ),
    "hf/Mistral": hugging("MistralForCausalLM", "MistralConfig", **DECODER),
    "hf/Mixtral (MoE)": hugging("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4),
    "hf/OPT": hugging(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
    "hf/Phi": hugging("PhiForCausalLM", "PhiConfig", **DECODER),
    "hf/Qwen2": hugging("Qwen2ForCausalLM", "Qwen2Config", **DECODER, use_cache=False),
    "hf/Qwen2-MoE": hugging(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **DECODER,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "hf/RoBERTa-MLM (tied)": hugging("RobertaForMaskedLM", "RobertaConfig", **ENCODER),
    "hf/T5": hugging(
        "T5ForConditionalGeneration",
        "T5Config",
        WITH_DECODER,
        vocab_size=WORDS,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        use_cache=False,
    ),
    "hf/Whisper": hugging(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        named(input_features=noise(20, 64), decoder_input_ids=ids(WORDS, 8)),
        **{key: value for key, value in PAIRED.items() if key != "max_position_embeddings"},
        num_mel_bins=20,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "hf/wav2vec2": hugging(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        named(input_values=noise(1600)),
        **TOWER,
        vocab_size=32,
        conv_dim=[32, 32, 32],
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "hf/MobileBERT": hugging(
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        **ENCODER,
        embedding_size=32,
        intra_bottleneck_size=32,
        true_hidden_size=32,
    ),
    "hf/Falcon": hugging(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    ),
    "hf/ModernBERT": hugging("ModernBertForMaskedLM", "ModernBertConfig", **ENCODER, pad_token_id=0),
    "hf/PatchTST": hugging(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        named(past_values=noise(32, 3)),
        num_input_channels=3,
        context_length=32,
        prediction_length=8,
        patch_length=8,
        patch_stride=8,
        d_model=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
    ),
    "open_clip/CLIP": open_clip,
    "x_transformers/Decoder": decoder,
    "x_transformers/ViT": vision_transformer,
    "diffusers/AutoencoderKL": from_module(
        "diffusers:AutoencoderKL",
        pictures(32),
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ),
    "diffusers/DiT": from_module(
        "diffusers:DiTTransformer2DModel",
        named(
            hidden_states=noise(4, 8, 8),
            timestep=lambda n: torch.arange(1, n + 1),
            class_labels=lambda n: torch.arange(n) % 10,
        ),
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ),
    "diffusers/UNet2DCondition": from_module(
        "diffusers:UNet2DConditionModel",
        named(
            sample=noise(4, 16, 16),
            timestep=lambda n: torch.arange(1, n + 1),
            encoder_hidden_states=noise(6, 32),
        ),
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ),
}
