"""The architectures, with random weights, and what is expected to be refused for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

CLASSES = 10
ACT = "no subclass, .* got BatchNormAct2d"  # timm's norm with its activation


class Network(NamedTuple):
    """An architecture to be tried.

    make: builds it, with random weights, for CLASSES classes.
    shape: of one input, without the batch.
    quick: whether it is in the part for continuous integration.
    replaced: how many of its norms ``replace`` turns into IterNorm; None for all of them.
    kept: how many norms ``fold`` leaves in it, by a pattern of the reason.
    kept_converted: the same for the network with IterNorm, where that differs.
    pairs: the names of a layer and of the norm behind it in their module, where ``fold`` has to be told.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 32, 32)
    quick: bool = False
    replaced: int | None = None
    kept: Mapping[str, int] = MappingProxyType({})
    kept_converted: Mapping[str, int] | None = None
    pairs: tuple[str, str] | None = None


def torchvision(name: str, module: str = "torchvision.models", **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module(module), name)(weights=None, num_classes=CLASSES, **options)


def segmentation(name: str) -> Callable[[], nn.Module]:
    return torchvision(name, "torchvision.models.segmentation", weights_backbone=None)


def frozen() -> nn.Module:
    """Build a detector's backbone, whose norms are FrozenBatchNorm2d."""
    norm = import_module("torchvision.ops").FrozenBatchNorm2d
    return torchvision("resnet18", norm_layer=norm)()


def vgg() -> nn.Module:
    """Build a VGG without the two linear layers that have nine tenths of its parameters."""
    network = torchvision("vgg11_bn")()
    network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
    return network


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


def transformers(family: str, task: str = "ImageClassification", **options: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model of Hugging Face from its configuration."""

    def make() -> nn.Module:
        library = import_module("transformers")
        return getattr(library, f"{family}For{task}")(
            getattr(library, f"{family}Config")(num_labels=CLASSES, **options)
        )

    return make


segformer = transformers("Segformer", "SemanticSegmentation", hidden_sizes=[16, 32, 40, 64], decoder_hidden_size=64)


def segmentation_models(name: str, encoder: str) -> Callable[[], nn.Module]:
    library = "segmentation_models_pytorch"
    return lambda: getattr(import_module(library), name)(encoder, encoder_weights=None, classes=CLASSES)


NETWORKS: dict[str, Network] = {
    "torchvision resnet18": Network(torchvision("resnet18"), quick=True),
    "torchvision resnext50_32x4d": Network(torchvision("resnext50_32x4d")),
    "torchvision vgg11_bn": Network(vgg),
    "torchvision densenet121": Network(torchvision("densenet121"), kept={"got cat; .* got (ReLU|relu)$": 62}),
    "torchvision mobilenet_v2": Network(torchvision("mobilenet_v2"), quick=True),
    "torchvision mobilenet_v3_small": Network(torchvision("mobilenet_v3_small")),
    "torchvision shufflenet_v2_x0_5": Network(torchvision("shufflenet_v2_x0_5"), quick=True),
    "torchvision mnasnet0_5": Network(torchvision("mnasnet0_5")),
    "torchvision efficientnet_b0": Network(torchvision("efficientnet_b0")),
    "torchvision regnet_y_400mf": Network(torchvision("regnet_y_400mf")),
    "torchvision googlenet": Network(torchvision("googlenet", aux_logits=False, init_weights=False)),
    "torchvision inception_v3": Network(torchvision("inception_v3", aux_logits=False, init_weights=False), (3, 96, 96)),
    "torchvision r3d_18": Network(torchvision("r3d_18", "torchvision.models.video"), (3, 4, 32, 32)),
    "torchvision resnet18, FrozenBatchNorm2d": Network(frozen, replaced=0),
    "torchvision deeplabv3_resnet50": Network(segmentation("deeplabv3_resnet50")),
    "torchvision lraspp_mobilenet_v3_large": Network(segmentation("lraspp_mobilenet_v3_large")),
    "timm resnet50d": Network(timm("resnet50d")),
    "timm seresnet50": Network(timm("seresnet50")),
    "timm dla34": Network(timm("dla34")),
    "timm hrnet_w18_small": Network(timm("hrnet_w18_small")),
    "timm ghostnet_100": Network(timm("ghostnet_100"), replaced=79, kept={ACT: 1}),
    "timm levit_128s": Network(timm("levit_128s"), (3, 224, 224), kept={"got flatten; .* got reshape_as": 46}),
    "timm convmixer_768_32": Network(timm("convmixer_768_32"), kept={"in front of it, got ReLU": 65}),
    "timm regnety_002": Network(timm("regnety_002"), replaced=0, kept={ACT: 44}),
    "timm mobilenetv3_small_050": Network(timm("mobilenetv3_small_050"), replaced=0, kept={ACT: 34}),
    "transformers ResNet": Network(
        transformers("ResNet", embedding_size=16, hidden_sizes=[16, 32, 64, 128]), quick=True
    ),
    "transformers RegNet": Network(transformers("RegNet", hidden_sizes=[32, 64, 96, 128], groups_width=16)),
    "transformers MobileNetV2": Network(
        transformers("MobileNetV2", depth_multiplier=0.5), kept={"use of the value of getitem": 52}
    ),
    "transformers MobileNetV2, pairs named": Network(
        transformers("MobileNetV2", depth_multiplier=0.5), pairs=("convolution", "normalization")
    ),
    "transformers SegFormer": Network(segformer, kept={"Proxy object cannot be iterated": 1}),
    "transformers SegFormer, pairs named": Network(segformer, quick=True, pairs=("linear_fuse", "batch_norm")),
    "transformers MobileViT": Network(transformers("MobileViT", image_size=64), (3, 64, 64)),
    "segmentation-models Unet resnet18": Network(segmentation_models("Unet", "resnet18"), quick=True),
    "segmentation-models DeepLabV3Plus mobilenet_v2": Network(segmentation_models("DeepLabV3Plus", "mobilenet_v2")),
    "segmentation-models FPN efficientnet-b0": Network(
        segmentation_models("FPN", "efficientnet-b0"),
        kept={"no subclass in it, .* got Conv2dStaticSamePadding; and": 47, "expected a call of it, found none": 1},
    ),
}
