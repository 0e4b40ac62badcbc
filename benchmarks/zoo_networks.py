"""The networks of bench_zoo, by name, each with ten classes and random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
MARK = "zoo: "  # in front of the results that zoo_measure prints, among whatever else is printed
NARROWED, NEITHER = "norm narrowed", "nor does the whole network"  # results other than "yes" and "no"


@dataclass(frozen=True)
class Network:
    """How to make one, and the side of its images."""

    make: Callable[[], nn.Module]
    size: int = 64


def _torchvision(name: str, size: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return Network(make, size)


def _timm(name: str, size: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return Network(make, size)


def _transformers(name: str, size: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return Network(make, size)


def _vision(name: str, **options: Any) -> Network:
    """The vision half of a model of images and texts."""
    return _transformers(name, vision_config={"image_size": 64, "patch_size": 8, **options})


def _vgg() -> nn.Module:
    """VGG-11 with narrower linear layers: its own hold nine tenths of all parameters."""
    import torchvision

    net = torchvision.models.vgg11_bn(weights=None)
    net.classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )
    return net


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's block: halves of the channels, one of them through bottlenecks, all concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.width = outputs // 2
        self.cv1, self.cv2 = conv(inputs, outputs, 1), conv((2 + depth) * self.width, outputs, 1)
        self.m = nn.ModuleList(Bottleneck(self.width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(width, width // 2, 1), conv(2 * width, width, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


def _yolo() -> nn.Module:
    widths = (16, 32, 64, 128, 256)
    layers: list[nn.Module] = [conv(3, widths[0], stride=2)]
    for i, depth in enumerate((1, 2, 2, 1)):
        layers += [conv(widths[i], widths[i + 1], stride=2), C2f(widths[i + 1], widths[i + 1], depth)]
    layers += [SPPF(widths[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Gives a map; the mean of a last convolution over it are the logits."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        down = [nn.Sequential(conv(a, b), conv(b, b)) for a, b in zip((3, *widths), widths, strict=False)]
        self.down, self.pool = nn.ModuleList(down), nn.MaxPool2d(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(nn.Sequential(conv(2 * b, b), conv(b, b)) for _, b in pairs)
        self.map = nn.Conv2d(widths[0], 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if kept else x)
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(self.map(x).relu().mean((2, 3)))


class Recurrent(nn.Module):
    """A small CNN whose columns are the steps of a recurrent layer."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 32, stride=2), conv(32, 64, stride=2), conv(64, 64, stride=2))
        self.rnn = kind(64, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.features(x).mean(2).transpose(1, 2)
        return self.head(self.rnn(steps)[0][:, -1])


_VIT = {"image_size": 64, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6}
_PATCHES = {**_VIT, "patch_size": 8}

NETWORKS = {
    "torchvision efficientnet_b0": _torchvision("efficientnet_b0"),
    "torchvision mobilenet_v2": _torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "torchvision resnet18": _torchvision("resnet18"),
    "torchvision resnet50": _torchvision("resnet50"),
    "torchvision resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "torchvision regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "torchvision densenet121": _torchvision("densenet121"),
    "torchvision vgg11_bn, narrow head": Network(_vgg),
    "torchvision vit_b_16": _torchvision("vit_b_16", image_size=64),
    "torchvision swin_t": _torchvision("swin_t"),
    "torchvision shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "torchvision googlenet": _torchvision("googlenet", init_weights=True),
    "torchvision inception_v3": _torchvision("inception_v3", 75, init_weights=True, aux_logits=False),
    "torchvision mnasnet1_0": _torchvision("mnasnet1_0"),
    "timm efficientnetv2_rw_t": _timm("efficientnetv2_rw_t"),
    "timm mobilenetv4_conv_small": _timm("mobilenetv4_conv_small"),
    "timm convnextv2_atto": _timm("convnextv2_atto"),
    "timm eca_nfnet_l0": _timm("eca_nfnet_l0"),
    "timm seresnet18": _timm("seresnet18"),
    "timm vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=64),
    "timm deit3_small_patch16_224": _timm("deit3_small_patch16_224", img_size=64),
    "timm vit_small_plus_patch16_dinov3": _timm("vit_small_plus_patch16_dinov3", img_size=64),
    "timm eva02_tiny_patch14_224": _timm("eva02_tiny_patch14_224", 56, img_size=56),
    "timm xcit_nano_12_p16_224": _timm("xcit_nano_12_p16_224", img_size=64),
    "timm swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", img_size=64),
    "timm swinv2_tiny_window8_256": _timm("swinv2_tiny_window8_256", img_size=64),
    "timm maxvit_pico_rw_256": _timm("maxvit_pico_rw_256", img_size=64),
    "timm mobilevit_xxs": _timm("mobilevit_xxs"),
    "timm mobilevitv2_050": _timm("mobilevitv2_050"),
    "timm mvitv2_tiny": _timm("mvitv2_tiny", img_size=64),
    "timm pit_ti_224": _timm("pit_ti_224", img_size=64),
    "timm levit_128s": _timm("levit_128s", img_size=64),
    "timm coat_lite_tiny": _timm("coat_lite_tiny", img_size=64),
    "timm volo_d1_224": _timm("volo_d1_224", img_size=64),
    "timm poolformer_s12": _timm("poolformer_s12"),
    "timm efficientformer_l1": _timm("efficientformer_l1", 224),
    "timm fastvit_t8": _timm("fastvit_t8"),
    "timm repvgg_a0": _timm("repvgg_a0"),
    "timm ghostnet_100": _timm("ghostnet_100"),
    "timm hrnet_w18_small": _timm("hrnet_w18_small"),
    "timm res2net50_14w_8s": _timm("res2net50_14w_8s"),
    "timm dla34": _timm("dla34"),
    "timm cspresnet50": _timm("cspresnet50"),
    "timm mixer_s32_224": _timm("mixer_s32_224", img_size=64),
    "timm gmlp_ti16_224": _timm("gmlp_ti16_224", img_size=64),
    "transformers ViT": _transformers("ViT", **_PATCHES, intermediate_size=768),
    "transformers DINOv2": _transformers("Dinov2", **_PATCHES),
    "transformers DINOv2, SwiGLU": _transformers("Dinov2", **_PATCHES, use_swiglu_ffn=True),
    "transformers BEiT": _transformers(
        "Beit", **_PATCHES, intermediate_size=768, use_relative_position_bias=True, layer_scale_init_value=0.1
    ),
    "transformers Swin": _transformers("Swin", image_size=64, patch_size=2, window_size=4, embed_dim=48),
    "transformers ConvNeXt": _transformers("ConvNext", hidden_sizes=[48, 96, 192, 384]),
    "transformers ResNet": _transformers(
        "ResNet", embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]
    ),
    "transformers MobileViT": _transformers("MobileViT", image_size=64),
    "transformers CLIP vision": _vision("CLIP", hidden_size=192, intermediate_size=768, num_hidden_layers=6),
    "transformers SigLIP vision": _vision("Siglip", hidden_size=192, intermediate_size=768, num_hidden_layers=6),
    "C2f backbone as in YOLOv8": Network(_yolo),
    "U-Net": Network(UNet),
    "CNN and GRU": Network(partial(Recurrent, nn.GRU)),
    "CNN and LSTM": Network(partial(Recurrent, nn.LSTM)),
}
