"""Networks of many kinds, in float64 and eval mode: for tests of `TrackedNetwork`, and for `benchmark.py networks`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer


class WrittenLayerNorm(nn.LayerNorm):
    """nn.LayerNorm by elementary functions, whose second derivatives torch has right under vmap and forward mode."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


class Block(nn.Module):
    """A transformer's, with causal attention. written_out: norms and attention by elementary functions."""

    def __init__(self, width: int, heads: int, hidden: int, written_out: bool):
        super().__init__()
        norm = WrittenLayerNorm if written_out else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.heads, self.written_out = heads, written_out

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (z.view(B, T, self.heads, width // self.heads).transpose(1, 2) for z in (q, k, v))
        if self.written_out:
            later = ~torch.ones(T, T, dtype=torch.bool).tril()
            scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
            attended = scores.softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(B, T, width))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (N, T) to the logits of the next ones (N, T, vocabulary)."""

    def __init__(
        self,
        blocks: int = 2,
        width: int = 4,
        heads: int = 2,
        tokens: int = 3,
        vocabulary: int = 5,
        *,
        expansion: int = 2,
        tied: bool = False,
        written_out: bool = False,
    ):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.3 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, expansion * width, written_out) for _ in range(blocks))
        self.norm = WrittenLayerNorm(width) if written_out else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """A cell over 8 steps: its weights are tied over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inputs(x[:, 0]))
        for step in range(1, 8):
            h = torch.tanh(self.inputs(x[:, step]) + self.state(h))
        return self.out(h)


class DenselyConnected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(7, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.tanh(self.a(x))], 1)
        return self.c(torch.cat([x, torch.tanh(self.b(x))], 1))


class Autoencoder(nn.Module):
    """Its decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(4, 6))
        self.bias, self.out_bias = nn.Parameter(0.1 * torch.randn(4)), nn.Parameter(0.1 * torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.t(), self.out_bias)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.up, self.c, self.out = nn.Upsample(scale_factor=2), nn.Conv2d(5, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.softplus(self.b(a))
        return self.out(torch.tanh(self.c(torch.cat([a, self.up(b)], 1))))


class Residual(nn.Module):
    """A residual block with a strided convolution, BatchNorm in eval, and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.shortcut, self.relu, self.out = nn.Conv2d(2, 3, 1, stride=2), nn.ReLU(inplace=True), nn.Linear(3, 3)
        for norm in (self.norm1, self.norm2):
            norm.running_mean, norm.running_var = torch.randn(3), 0.5 + 1.5 * torch.rand(3)
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.out(F.silu(y).mean((2, 3)))


class ResNet(nn.Module):
    """Residual blocks of two 3 × 3 convolutions with GroupNorm, from grey images (N, 1, H, W)."""

    def __init__(self, blocks: int, width: int, classes: int, *, stride: int = 1):
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, width, 3, stride, 1), nn.Linear(width, classes)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(2, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(2, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.out(F.gelu(x).mean((2, 3)))


class Grouped(nn.Module):
    """Depthwise, grouped and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1, groups=2)
        self.c, self.out = nn.Conv1d(6, 3, 3, dilation=2, padding="same"), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.b(F.mish(self.a(x))))
        return self.out(torch.tanh(self.c(x.flatten(2))).mean(2))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(4), nn.Linear(5, 5)
        self.norm2, self.channels, self.out = nn.GroupNorm(1, 5), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.tokens(self.norm1(x).transpose(1, 2))).transpose(1, 2)
        return self.out((x + F.gelu(self.channels(self.norm2(x)), approximate="tanh")).mean(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = torch.tanh(self.a(x)), torch.sigmoid(self.b(y))
        return self.out(torch.cat([a * b, a - b, x[:, :3] * y[:, 1:4]], 1))


def vision_transformer(
    layers: int = 1, width: int = 4, heads: int = 2, image: int = 4, patch: int = 2, classes: int = 3
) -> nn.Module:
    """torchvision's, with a random output layer and class token, which are 0 there."""
    net = VisionTransformer(image, patch, layers, heads, width, 2 * width, num_classes=classes)
    net.heads = nn.Sequential(nn.Linear(width, classes))
    nn.init.normal_(net.class_token)
    return net


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.Sigmoid(),
        nn.Linear(6, 3),
    )


def lenet_of_digits() -> nn.Module:
    """Smooth, on 8 × 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, 10),
    )


def lenet5() -> nn.Module:
    """LeCun et al. 1998, on images of 28 × 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def rectified() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 4), nn.LeakyReLU(), nn.Linear(4, 3)
    )


def half_frozen() -> nn.Module:
    net = GPT()
    for name, p in net.named_parameters():
        p.requires_grad_("blocks.0" not in name and "embed" not in name and "contract.weight" not in name)
    return net


class Example(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample; of tokens where it has one dimension and the loss is over them
    outputs: int | tuple[int, ...]  # classes, or the shape of the targets
    batch: int = 3
    loss: str | Callable = "cross_entropy"


EXAMPLES: dict[str, Example] = {
    "lenet": Example(lenet, (1, 8, 8), 3),
    "residual": Example(Residual, (2, 6, 6), 3),
    "gpt": Example(GPT, (3,), 5, 2),
    "gpt, tied": Example(partial(GPT, tied=True), (3,), 5, 2),
    "gpt, written out": Example(partial(GPT, 1, tokens=4, written_out=True), (4,), 5, 1),
    "gpt, half frozen": Example(half_frozen, (3,), 5, 2),
    "vision transformer": Example(vision_transformer, (3, 4, 4), 3, 2),
    "recurrent": Example(Recurrent, (8, 3), 3),
    "densely connected": Example(DenselyConnected, (4,), 3, 6),
    "autoencoder": Example(Autoencoder, (6,), (6,), 5, "mse"),
    "u-net": Example(UNet, (1, 6, 6), 2, 1),
    "grouped": Example(Grouped, (4, 4, 4), 3),
    "mixer": Example(Mixer, (5, 4), 3),
    "rectified": Example(rectified, (5,), 3, 4),
    "binary": Example(DenselyConnected, (4,), (3,), 4, "binary_cross_entropy"),
    "weighted": Example(
        DenselyConnected, (4,), 3, 4, nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    ),
    "a function": Example(DenselyConnected, (4,), (3,), 4, lambda outputs, y: ((outputs - y) ** 4).sum(1)),
}


def build(example: Example, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, inputs and targets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = example.make().double().eval()
        over_tokens = isinstance(net, GPT)
        if isinstance(net, GPT):
            x = torch.randint(net.embed.num_embeddings, (example.batch, *example.shape))
        else:
            x = torch.randn(example.batch, *example.shape, dtype=torch.float64)
        if isinstance(example.outputs, tuple):
            y = torch.rand(example.batch, *example.outputs, dtype=torch.float64)
        else:
            inner = example.shape if over_tokens else example.shape[1:] if isinstance(net, UNet) else ()
            y = torch.randint(example.outputs, (example.batch, *inner))
    return net, x, y
