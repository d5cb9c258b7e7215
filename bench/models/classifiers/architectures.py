"""LeNet, VGG, MobileNet, DenseNet and ResNet: their layers, and the networks by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UserError, error_sentence, unknown_name
from bench.models.classifiers.classifier import Classifier, VisionConfig, initialise, pooled_head
from bench.models.classifiers.pruned_modules import prune_attention, reduce_to_shortcut

# From this size on, a ResNet's stem reduces the image by four, as for ImageNet, and MobileNet's
# first layer by two.
LARGE_IMAGE = 64


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return convolution, BatchNorm and ReLU; with stride 1 the image keeps its size."""
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride, groups), nn.ReLU(inplace=True))


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return convolution and BatchNorm."""
    padding = kernel // 2
    # Without bias, because BatchNorm would subtract it.
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def lenet5(config: VisionConfig) -> Classifier:
    """Return LeNet-5: 6 and 16 filters of 5x5, dense layers of 120 and 84."""
    features = nn.Sequential(
        *_lenet_stage(config.channels, 6, kernel=5, padding=2),
        *_lenet_stage(6, 16, kernel=5, padding=0),
        nn.Flatten(),
    )
    # The first convolution is padded, the second (5x5) removes 4 pixels; pooling halves both.
    side = (config.size // 2 - 4) // 2
    return Classifier(config, features, _lenet_head(16 * side**2, 120, 84, config.classes))


def micro_lenet(config: VisionConfig) -> Classifier:
    """Return a LeNet for images of 8x8: 16 and 32 filters of 3x3, dense layers of 64 and 32."""
    features = nn.Sequential(
        *_lenet_stage(config.channels, 16, kernel=3, padding=1),
        *_lenet_stage(16, 32, kernel=3, padding=1),
        nn.Flatten(),
    )
    return Classifier(
        config, features, _lenet_head(32 * (config.size // 4) ** 2, 64, 32, config.classes)
    )


def _lenet_stage(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding)
    return [layer, nn.ReLU(inplace=True), nn.MaxPool2d(2)]


def _lenet_head(inputs: int, first: int, second: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, first),
        nn.ReLU(inplace=True),
        nn.Linear(first, second),
        nn.ReLU(inplace=True),
        nn.Linear(second, classes),
    )


StageWidths = tuple[tuple[int, ...], ...]


VGG16: StageWidths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


VGG_MICRO: StageWidths = ((16, 16), (32, 32), (32, 32))


def vgg16(config: VisionConfig) -> Classifier:
    """Return VGG-16: thirteen convolutions in five stages."""
    return _vgg(config, VGG16)


def micro_vgg(config: VisionConfig) -> Classifier:
    """Return a VGG of six convolutions for images of 8x8."""
    return _vgg(config, VGG_MICRO)


def _vgg(config: VisionConfig, stages: StageWidths) -> Classifier:
    layers: list[nn.Module] = []
    inputs = config.channels
    for number, stage in enumerate(stages):
        if number > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [conv_bn_relu(before, width) for before, width in pairwise((inputs, *stage))]
        inputs = stage[-1]
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))


LayerWidths = tuple[tuple[int, int], ...]


MOBILENET: LayerWidths = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


MOBILENET_MICRO: LayerWidths = ((32, 1), (32, 1), (64, 2), (64, 1))


def mobilenet_v1(config: VisionConfig) -> Classifier:
    """Return MobileNetV1; images below 64 pixels keep their size in the first layer."""
    return _mobilenet(config, 32, MOBILENET)


def micro_mobilenet(config: VisionConfig) -> Classifier:
    """Return a MobileNet of four blocks for images of 8x8."""
    return _mobilenet(config, 16, MOBILENET_MICRO)


def _mobilenet(config: VisionConfig, stem: int, plan: LayerWidths) -> Classifier:
    """Return a MobileNet; `plan` has width and stride of every block."""
    stride = 2 if config.size >= LARGE_IMAGE else 1
    layers: list[nn.Module] = [conv_bn_relu(config.channels, stem, stride=stride)]
    inputs = stem
    for width, step in plan:
        layers.append(conv_bn_relu(inputs, inputs, stride=step, groups=inputs))
        layers.append(conv_bn_relu(inputs, width, kernel=1))
        inputs = width
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a convolution whose new channels are appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.convolution = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with the new channels appended."""
        return torch.cat([x, self.convolution(torch.relu(self.norm(x)))], 1)


def densenet40(config: VisionConfig) -> Classifier:
    """Return DenseNet-40: three blocks of twelve layers, growth rate 12."""
    return _densenet(config, growth=12, blocks=(12, 12, 12))


def micro_densenet(config: VisionConfig) -> Classifier:
    """Return a DenseNet of two blocks of three layers for images of 8x8."""
    return _densenet(config, growth=8, blocks=(3, 3))


def _densenet(config: VisionConfig, growth: int, blocks: tuple[int, ...]) -> Classifier:
    """Return a DenseNet whose transitions keep the number of channels and halve the image."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(config.channels, width, 3, padding=1, bias=False)]
    for number, count in enumerate(blocks):
        if number > 0:
            layers += _densenet_transition(width)
        for _ in range(count):
            layers.append(DenseLayer(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return Classifier(config, nn.Sequential(*layers), pooled_head(width, config.classes))


def _densenet_transition(width: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.AvgPool2d(2),
    ]


class ResidualBlock(nn.Module):
    """Sum of a branch and a shortcut, then ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(shortcut(x) + branch(x))."""
        return torch.relu(self.shortcut(x) + self.branch(x))


ResidualMaker = Callable[[int, int, int], ResidualBlock]


BOTTLENECK_EXPANSION = 4


def resnet18(config: VisionConfig) -> Classifier:
    """Return ResNet-18: two basic blocks in each of four stages."""
    return _resnet(config, basic_block, ((64, 2), (128, 2), (256, 2), (512, 2)))


def resnet20(config: VisionConfig) -> Classifier:
    """Return ResNet-20 of CIFAR: three basic blocks in each of three narrow stages."""
    return _resnet(config, basic_block, ((16, 3), (32, 3), (64, 3)))


def resnet50(config: VisionConfig) -> Classifier:
    """Return ResNet-50: stages of 3, 4, 6 and 3 bottlenecks."""
    return _resnet(config, bottleneck, ((256, 3), (512, 4), (1024, 6), (2048, 3)), stem=64)


def micro_resnet(config: VisionConfig) -> Classifier:
    """Return a ResNet of three basic blocks for images of 8x8."""
    return _resnet(config, basic_block, ((16, 1), (32, 1), (64, 1)))


def _resnet(
    config: VisionConfig, block: ResidualMaker, stages: tuple[tuple[int, int], ...], stem: int = 0
) -> Classifier:
    """Return a ResNet; `stages` has width and number of blocks, `stem` its width if different."""
    inputs = stem or stages[0][0]
    if config.size >= LARGE_IMAGE:
        first = conv_bn_relu(config.channels, inputs, kernel=7, stride=2)
        layers: list[nn.Module] = [first, nn.MaxPool2d(3, stride=2, padding=1)]
    else:
        layers = [conv_bn_relu(config.channels, inputs)]
    for number, (width, blocks) in enumerate(stages):
        for index in range(blocks):
            # The first block of every stage but the first halves the image.
            layers.append(block(inputs, width, 2 if index == 0 and number > 0 else 1))
            inputs = width
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))


def basic_block(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    """Return two 3x3 convolutions with a shortcut."""
    branch = nn.Sequential(conv_bn_relu(inputs, outputs, stride=stride), conv_bn(outputs, outputs))
    return ResidualBlock(branch, _shortcut(inputs, outputs, stride))


def bottleneck(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    """Return 1x1, 3x3 and 1x1 convolutions, the middle one four times narrower."""
    inner = outputs // BOTTLENECK_EXPANSION
    branch = nn.Sequential(
        conv_bn_relu(inputs, inner, kernel=1),
        # The stride is in the 3x3 convolution as in torchvision (v1.5), while the paper has it in
        # the first 1x1 convolution.
        conv_bn_relu(inner, inner, stride=stride),
        conv_bn(inner, outputs, kernel=1),
    )
    return ResidualBlock(branch, _shortcut(inputs, outputs, stride))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return conv_bn(inputs, outputs, kernel=1, stride=stride)


ARCHITECTURES: dict[str, Callable[[VisionConfig], Classifier]] = {
    # Function names are the names in configs and saved folders, so renaming one breaks both.
    maker.__name__: maker
    for maker in (
        lenet5,
        vgg16,
        resnet18,
        resnet20,
        resnet50,
        mobilenet_v1,
        densenet40,
        micro_lenet,
        micro_vgg,
        micro_resnet,
        micro_mobilenet,
        micro_densenet,
    )
}


TORCHVISION_PREFIX = "torchvision/"
_MODULES: dict[str, type[nn.Module]] = {}
"""Classes of users by their name in configs. A saved folder names a class but cannot import it."""


def register_module(target: str) -> None:
    """Import a user's class, whose package the run's config allows, so that it can be built.

    Raises:
        UserError: it cannot be imported, or is not a torch.nn.Module.
    """
    module, _, name = target.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    # The user's module may raise any exception.
    except Exception as error:
        raise UserError(f"model._target_={target}: {error_sentence(error)}") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"model._target_={target} is not a class of torch.nn.Module")
    _MODULES[target] = kind


def _users_classifier(config: VisionConfig) -> Classifier:
    target = config.architecture
    try:
        network = _MODULES[target](**config.arguments)
    except Exception as error:
        raise UserError(
            f"model._target_={target} cannot be called with model.arguments={config.arguments}: "
            f"{error_sentence(error)}"
        ) from error
    return whole_network(config, network)


def _torchvision_classifier(config: VisionConfig) -> Classifier:
    from torchvision import models

    name = config.architecture.removeprefix(TORCHVISION_PREFIX)
    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    if config.channels != 3:
        raise UserError(
            f"{config.architecture} takes 3 channels; the images have {config.channels}"
        )
    # Only weights of vision transformers depend on the size of the images.
    arguments: dict[str, Any] = {"image_size": config.size} if name.startswith("vit_") else {}
    if name in AUXILIARY_HEADS:
        # In training, auxiliary heads would make the output a tuple; otherwise they are parameters
        # that no forward reads. torchvision warns unless the initialisation is chosen.
        arguments = {"aux_logits": False, "init_weights": True}
    arguments |= config.arguments
    build = partial(models.get_model, name, weights=None, num_classes=config.classes, **arguments)
    try:
        network = build()
    except NotImplementedError:
        # RegNet reads its widths from tensors, which have no values on the meta device.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            network = build()
        network.to(torch.get_default_device())
    except TypeError as error:
        raise UserError(
            f"{config.architecture} cannot be called with model.arguments={config.arguments}: "
            f"{error_sentence(error)}"
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{config.architecture} does not fit the images: {error}") from error
    return whole_network(config, network)


AUXILIARY_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Names of the weights of torchvision's auxiliary heads, which only its own training uses."""


def whole_network(config: VisionConfig, network: nn.Module) -> Classifier:
    """Return a foreign network as a classifier whose features are the whole network."""
    return Classifier(config, nn.Sequential(network), nn.Sequential())


def build_classifier(config: VisionConfig) -> Classifier:
    """Return the network with random weights and the shapes of pruned layers.

    Raises:
        UserError: the architecture does not exist, or the config resizes layers that it lacks.
    """
    name = config.architecture
    ours = name in ARCHITECTURES
    if ours:
        network = ARCHITECTURES[name](config)
    elif name.startswith(TORCHVISION_PREFIX):
        network = _torchvision_classifier(config)
    elif name in _MODULES:
        network = _users_classifier(config)
    elif "." in name:
        raise UserError(
            f"{name} is a class of your own: load it with model=module model._target_={name} "
            "model.path=FOLDER and its package in packages=[...]"
        )
    else:
        raise unknown_name("architecture", name, ARCHITECTURES)
    for shortcut in config.removed:
        reduce_to_shortcut(network, shortcut)
    for name, shape in config.shapes.items():
        layer = _layer_to_resize(network, name)
        if isinstance(layer, nn.MultiheadAttention):
            prune_attention(network, name).resize(shape)
        else:
            resize_layer(layer, shape)
    # After resizing, which leaves weights uninitialised, so that He's initialisation uses the fan
    # of the pruned layer. Foreign networks have their own initialisation.
    if ours or config.shapes:
        initialise(network)
    for name in config.shapes:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return network


def resize_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a layer an uninitialised weight of a new shape, and update what depends on it."""
    if isinstance(layer, nn.Conv2d):
        # All layers with groups are depthwise convolutions here. Their weight is [channels, 1, k,
        # k], so the number of input channels is the second dimension times the groups.
        depthwise = layer.groups > 1
        layer.groups = shape[0] if depthwise else 1
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = shape[0]
        # Statistics have the layer's length, and loading a state dict of another length would fail.
        layer.register_buffer("running_mean", torch.zeros(shape))
        layer.register_buffer("running_var", torch.ones(shape))
    else:
        raise UserError(f"a layer of type {type(layer).__name__} cannot be resized")
    with_bias = layer.bias is not None
    like = layer.weight
    layer.weight = nn.Parameter(like.new_ones(shape))
    if with_bias:
        layer.bias = nn.Parameter(like.new_zeros(shape[0]))


def _layer_to_resize(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the config resizes {name}, which {type(network).__name__} does not have"
        ) from None
