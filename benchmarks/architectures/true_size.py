"""The kinds of layers that tools leave alone, in networks of the size that people have, with random weights.

Of the largest language models, and of Mamba, which is slow in plain torch, two blocks are made at their true widths and
vocabulary, and of Mixtral two of the eight experts, which is how many a token meets: what one block costs, all do.
"""

from __future__ import annotations

import importlib
from functools import partial

from torch import nn

from architectures.images import from_module, timm
from architectures.language import ARCHITECTURES as SMALL
from architectures.language import hugging
from architectures.libraries import torchvision
from architectures.making import Architecture, Sample, ids, named, noise, ones, pictures, text, together
from architectures.own import Seq2Seq, Tagger, Translator, generator
from architectures.sound import audio, full

TOKENS = 128
MADE = 2
BLOCKS = {"hf/Llama (GQA)": 16, "hf/Mamba": 24, "hf/Mixtral (MoE)": 32, "hf/Qwen2": 24}
"""Of these so many blocks were made, and so many there are."""

BOTH = named(input_ids=ids(30_000, TOKENS), attention_mask=ones(TOKENS), decoder_input_ids=ids(30_000, TOKENS))


def clip() -> tuple[nn.Module, Sample]:
    """CLIP ViT-B/32 of open_clip."""
    torchvision()
    library = importlib.import_module("open_clip.model")
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    words = {"context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12}
    return library.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=words), together(pictures(224), ids(49_000, 77))


def exported(name: str) -> Architecture:
    """A small network of language.py without a cache among its outputs, and with experts that torch exports."""

    def make() -> tuple[nn.Module, Sample]:
        model, sample = SMALL[name]()
        model.config.use_cache = False
        model.generation_config.decoder_start_token_id = 1
        if hasattr(model.config, "num_local_experts"):
            model.set_experts_implementation("batched_mm")  # a loop over those that tokens meet is not exported
        return model, sample

    return make


EXPORTED = {name: exported(name) for name in ("hf/Mixtral (MoE)", "hf/OPT", "hf/T5", "hf/Whisper")}
"""In the place of those of the same name that torch does not export, or that cannot generate."""

ARCHITECTURES: dict[str, Architecture] = {
    "hf/BERT": hugging("BertForMaskedLM", "BertConfig", text(30_000, TOKENS)),
    "hf/DistilBERT": hugging("DistilBertForMaskedLM", "DistilBertConfig", text(30_000, TOKENS)),
    "hf/GPT-2 (Conv1D)": hugging("GPT2LMHeadModel", "GPT2Config", text(50_000, TOKENS), use_cache=False),
    "hf/Llama (GQA)": hugging(
        "LlamaForCausalLM",
        "LlamaConfig",
        text(100_000, TOKENS),
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=MADE,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "hf/Mamba": hugging(
        "MambaForCausalLM", "MambaConfig", named(input_ids=ids(50_000, 32)), num_hidden_layers=MADE, use_cache=False
    ),
    "hf/Mixtral (MoE)": hugging(
        "MixtralForCausalLM",
        "MixtralConfig",
        text(32_000, 16),
        num_hidden_layers=MADE,
        num_local_experts=2,
        use_cache=False,
    ),
    "hf/OPT": hugging("OPTForCausalLM", "OPTConfig", text(50_000, TOKENS), use_cache=False),
    "hf/Qwen2": hugging(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        text(100_000, TOKENS),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=MADE,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "hf/RoBERTa-MLM (tied)": hugging(
        "XLMRobertaForMaskedLM", "XLMRobertaConfig", text(200_000, TOKENS), vocab_size=250_002
    ),
    "hf/T5": hugging(
        "T5ForConditionalGeneration", "T5Config", BOTH, d_model=768, d_ff=3072, num_layers=12, num_heads=12
    ),
    "hf/Whisper": hugging(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        named(input_features=noise(80, 3000), decoder_input_ids=ids(50_000, 64)),
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        use_cache=False,
    ),
    "hf/wav2vec2": hugging("Wav2Vec2ForCTC", "Wav2Vec2Config", named(input_values=noise(16_000))),
    "timm/resnetv2_50x1_bit": timm("resnetv2_50x1_bit", 224, whole=True),
    "timm/eca_nfnet_l0": timm("eca_nfnet_l0", 224, whole=True),
    "timm/beit_base_patch16_224": timm("beit_base_patch16_224", 224, whole=True),
    "timm/eva02_tiny_patch14_224": timm("eva02_tiny_patch14_224", 224, whole=True),
    "efficientnet_pytorch/b0": from_module(
        "efficientnet_pytorch:EfficientNet.from_name", pictures(224), "efficientnet-b0"
    ),
    "tv/vit_small": from_module(
        "torchvision.models.vision_transformer:VisionTransformer", pictures(224), 224, 16, 12, 12, 768, 3072
    ),
    "open_clip/CLIP": clip,
    "torchaudio/Conformer": audio(
        "conformer",
        "Conformer",
        together(noise(400, 144), full(400)),
        input_dim=144,
        num_heads=4,
        ffn_dim=576,
        num_layers=16,
        depthwise_conv_kernel_size=31,
    ),
    "torchaudio/DeepSpeech": audio("deepspeech", "DeepSpeech", noise(1, 200, 40), n_feature=40),
    "torchaudio/WaveRNN": audio(
        "wavernn",
        "WaveRNN",
        together(noise(1, 1200), noise(1, 128, 10)),
        upsample_scales=[5, 5, 8],
        n_classes=512,
        hop_length=200,
    ),
    "monai/UNet3d": from_module(
        "monai.networks.nets:UNet",
        noise(1, 64, 64, 64),
        3,
        1,
        2,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
    ),
    "own/DCGAN (ConvTranspose)": partial(generator, (1024, 512, 256, 128), 4),
    "own/LSTM tagger": lambda: (Tagger(30_000, 300, 512), ids(30_000, TOKENS)),
    "own/GRU seq2seq": lambda: (Translator(30_000, 256, 1024), together(ids(30_000, 64), ids(30_000, 64))),
    "own/nn.Transformer": lambda: (
        Seq2Seq(30_000, 512, 8, 6, 2048),
        together(ids(30_000, TOKENS), ids(30_000, TOKENS)),
    ),
}
