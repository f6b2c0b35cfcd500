"""Writes tests/golden/contrastive-loss: CLIP's and SigLIP's losses with their gradients, by PyTorch alone.

The losses are those of the papers, in PyTorch's own functions: Radford et al. 2021, figure 3 (the mean of two
cross-entropies against the diagonal), and Zhai et al. 2023, algorithm 1 (pairwise log sigmoid). Where `open_clip` is
installed, its ClipLoss and SigLipLoss must give the same numbers.

    python tests/reference/make_contrastive.py
"""

import importlib.util
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from common import GOLDEN

# (pairs, width, log of the logit scale, logit bias, whether the features are unit vectors)
CASES = (
    (4, 8, np.log(1 / 0.07), -10.0, True),
    (4, 8, np.log(10.0), -10.0, True),
    (7, 5, np.log(100.0), 0.0, True),  # the clamped scale
    (1, 6, 0.0, 1.5, True),  # one pair alone: CLIP's loss is 0
    (5, 16, -0.5, -0.5, False),  # the losses do not normalise
)


def clip(images, texts, log_scale, bias):
    logits = log_scale.exp() * images @ texts.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def siglip(images, texts, log_scale, bias):
    logits = log_scale.exp() * images @ texts.T + bias
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)


def open_clip_losses():
    """open_clip's loss.py alone, which needs nothing but PyTorch; None where the package is not installed."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_losses", pathlib.Path(package.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_with_open_clip(inputs, values):
    losses = open_clip_losses()
    if losses is None:
        return print("open_clip is not installed: its losses were not compared")
    images, texts, log_scale, bias = inputs
    torch.testing.assert_close(losses.ClipLoss()(images, texts, log_scale.exp()), values["clip"])
    torch.testing.assert_close(losses.SigLipLoss()(images, texts, log_scale.exp(), bias), values["siglip"])


def case(generator, pairs, width, log_scale, bias, normalized):
    """-> {name: array} of one case."""
    features = torch.randn(2, pairs, width, generator=generator)
    images, texts = F.normalize(features, dim=-1) if normalized else 0.5 * features
    inputs = [x.clone().requires_grad_() for x in (images, texts, torch.tensor(log_scale).float(), torch.tensor(bias))]
    found = dict(zip(("image_features", "text_features", "log_logit_scale", "logit_bias"), inputs, strict=True))
    values = {}
    for kind, loss in (("clip", clip), ("siglip", siglip)):
        values[kind] = found[f"{kind}.loss"] = loss(*inputs)
        names = ("image", "text", "log_logit_scale", "logit_bias")
        gradients = torch.autograd.grad(values[kind], inputs, allow_unused=True)
        found |= {f"{kind}.grad_{name}": x for name, x in zip(names, gradients, strict=True) if x is not None}
    check_with_open_clip(inputs, values)
    return {name: x.detach().numpy() for name, x in found.items()}


def main():
    generator, arrays = torch.Generator().manual_seed(0), {}
    for i, settings in enumerate(CASES):
        arrays |= {f"case{i}.{name}": x for name, x in case(generator, *settings).items()}
    out = GOLDEN / "contrastive-loss" / "expected.npz"
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(out, **arrays)
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
