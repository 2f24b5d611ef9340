"""What looks at images: timm, torchvision, transformers, segmentation_models_pytorch, MONAI and others."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from architectures.libraries import torchvision
from architectures.making import Architecture, Sample, noise, pictures

NARROW = (32, 64, 128, 256)

SMALLER: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": NARROW},
    "coatnet_pico_rw_224": {"embed_dim": (32, 64, 96, 128), "depths": (1, 1, 2, 1)},
    "eca_nfnet_l0": {"channels": (256, 256, 512, 512), "depths": (1, 1, 2, 1)},
    "resnetv2_50x1_bit": {"channels": (128, 256, 512, 1024)},
    "beit_base_patch16_224": {"embed_dim": 192, "depth": 4, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 48, "depths": (1, 1, 2, 1)},
    "resnet50": {"channels": NARROW, "layers": (1, 1, 2, 1)},
    "densenet121": {"block_config": (3, 3, 3, 3)},
}


def timm(name: str, size: int = 64, *, whole: bool = False, **settings: Any) -> Architecture:
    """A model of timm; of 10 classes and smaller, if it is not wanted whole."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        library = importlib.import_module("timm")
        smaller = {} if whole else {"num_classes": 10, **SMALLER.get(name, {})}
        return library.create_model(name, pretrained=False, **smaller, **settings), pictures(size)

    return make


def vision(name: str, size: int = 64, package: str = "torchvision.models", **settings: Any) -> Architecture:
    """A model of torchvision."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        models = importlib.import_module(package)
        return getattr(models, name)(weights=None, **settings), pictures(size)

    return make


def detector(name: str, size: int, **settings: Any) -> Architecture:
    """A detector of torchvision: a list of images in, a list of dicts out."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        models = importlib.import_module("torchvision.models.detection")
        model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=4, **settings)
        model.transform.fixed_size = (size, size)  # what the images are enlarged to
        sample = pictures(size)

        def listed(n: int) -> list[Tensor]:
            return list(sample(n).sigmoid())

        return model, listed

    return make


def segmented(name: str, encoder: str, **settings: Any) -> Architecture:
    """A model of segmentation_models_pytorch."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        library = importlib.import_module("segmentation_models_pytorch")
        model = getattr(library, name)(encoder, encoder_weights=None, in_channels=3, classes=4, **settings)
        return model, pictures(64)

    return make


def seen(kind: str, config: str, size: int = 64, **settings: Any) -> Architecture:
    """A model of transformers that takes pixels."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        library = importlib.import_module("transformers")
        model = getattr(library, kind)(getattr(library, config)(**settings))
        sample = pictures(size)
        return model, lambda n: {"pixel_values": sample(n)}

    return make


def from_module(path: str, sample: Sample, *arguments: Any, **settings: Any) -> Architecture:
    """Whatever `module:name` makes of the arguments."""

    def make() -> tuple[nn.Module, Sample]:
        torchvision()
        module, _, name = path.partition(":")
        return attrgetter(name)(importlib.import_module(module))(*arguments, **settings), sample

    return make


PATCHES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 8,
}

ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"timm/{name}": timm(name, size, **({"img_size": size} if sized else {}))
        for name, size, sized in (
            ("beit_base_patch16_224", 64, True),
            ("coatnet_pico_rw_224", 64, True),
            ("convnext_atto", 64, False),
            ("convnextv2_atto", 64, False),
            ("deit_tiny_distilled_patch16_224", 64, True),
            ("densenet121", 64, False),
            ("dpn48b", 64, False),
            ("efficientformerv2_s0", 64, True),
            ("efficientnet_b0", 64, False),
            ("eva02_tiny_patch14_224", 56, True),
            ("ghostnet_050", 64, False),
            ("hrnet_w18_small", 64, False),
            ("mobilenetv3_small_100", 64, False),
            ("pvt_v2_b0", 64, False),
            ("regnety_002", 64, False),
            ("repvgg_a0", 64, False),
            ("resmlp_12_224", 64, True),
            ("resnet18", 64, False),
            ("resnet50", 64, False),
            ("rexnet_100", 64, False),
            ("swin_tiny_patch4_window7_224", 64, True),
            ("vit_tiny_patch16_224", 64, True),
            ("xcit_nano_12_p16_224", 64, True),
            ("resnetv2_50x1_bit", 64, False),
            ("eca_nfnet_l0", 64, False),
            ("poolformer_s12", 64, False),
            ("inception_next_atto", 64, False),
        )
    },
    "tv/googlenet": vision("googlenet", init_weights=False, num_classes=10, aux_logits=False),
    "tv/lraspp_mobilenet_v3_large": vision(
        "lraspp_mobilenet_v3_large", package="torchvision.models.segmentation", weights_backbone=None, num_classes=4
    ),
    "tv/mnasnet0_5": vision("mnasnet0_5", num_classes=10),
    "tv/shufflenet_v2_x0_5": vision("shufflenet_v2_x0_5", num_classes=10),
    "tv/squeezenet1_1": vision("squeezenet1_1", num_classes=10),
    "tv/ssdlite320 (list)": detector("ssdlite320_mobilenet_v3_large", 96, topk_candidates=30, detections_per_img=10),
    "tv/vit_small": from_module(
        "torchvision.models.vision_transformer:VisionTransformer", pictures(64), 64, 16, 2, 4, 64, 128, num_classes=10
    ),
    "smp/Segformer": segmented("Segformer", "mit_b0"),
    "smp/Unet": segmented("Unet", "mobilenet_v2", decoder_channels=(64, 48, 32, 24, 16)),
    "smp/UnetPlusPlus": segmented("UnetPlusPlus", "efficientnet-b0", decoder_channels=(64, 48, 32, 24, 16)),
    "smp/FPN": segmented("FPN", "mobilenet_v2", decoder_pyramid_channels=64, decoder_segmentation_channels=32),
    "hf/ViT-hf": seen("ViTForImageClassification", "ViTConfig", **PATCHES),
    "hf/Segformer-hf": seen(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=64,
    ),
    "hf/DINOv2": seen("Dinov2ForImageClassification", "Dinov2Config", **PATCHES, mlp_ratio=2),
    "hf/ConvNext-hf": seen(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]
    ),
    "efficientnet_pytorch/b0": from_module(
        "efficientnet_pytorch:EfficientNet.from_name", pictures(64), "efficientnet-b0", num_classes=10
    ),
    "pytorchcv/igcv3_wd4": from_module("pytorchcv.models.igcv3:igcv3_wd4", pictures(224), num_classes=10),
    "monai/UNETR": from_module(
        "monai.networks.nets:UNETR",
        noise(1, 32, 32, 32),
        1,
        2,
        (32, 32, 32),
        feature_size=8,
        hidden_size=64,
        mlp_dim=128,
        num_heads=4,
    ),
    "monai/UNet3d": from_module(
        "monai.networks.nets:UNet",
        noise(1, 32, 32, 32),
        3,
        1,
        2,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=1,
    ),
}
