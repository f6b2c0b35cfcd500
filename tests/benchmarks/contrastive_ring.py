"""Memory and exactness of the contrastive losses around a ring of devices (hovle_jax/training/losses/contrastive.py).

    python tests/benchmarks/contrastive_ring.py            # compiles 32,768 x 512; compares 4,096 x 512 with the twin
    python tests/benchmarks/contrastive_ring.py --full     # compares 32,768 x 512 too, minutes on two cores

64 CPU devices. For each loss: temporary bytes of a device in the compiled value and gradients, and how far these are
from the loss in float64 with numpy: the value relatively, each gradient relatively to its largest element.
"""

import argparse
import os
import time

DEVICES, WIDTH, LARGE, SMALL = 64, 512, 32768, 4096
BLOCK = 1024  # rows of scores that the twin holds at a time
MOST = {"sigmoid": 10, "softmax": 40}  # MiB
NAMES = ("images", "texts", "log scale", "bias")


def inputs(rows, loss):
    """Unit vectors of pairs that are alike, as of a model in training, the log of the scale and the bias."""
    import numpy as np

    rng = np.random.default_rng(0)
    images, noise = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
    texts = images + 2 * noise
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    scale, bias = {"softmax": (np.log(1 / 0.07), 0.0), "sigmoid": (np.log(10.0), -10.0)}[loss]
    return unit(images), unit(texts), np.float32(scale), np.float32(bias)


def twin(loss, images, texts, log_scale, bias):
    """-> (value, gradients) in float64, a block of rows at a time."""
    import numpy as np

    images, texts, scale, rows = images.astype(float), texts.astype(float), np.exp(float(log_scale)), len(images)
    blocks = range(0, rows, BLOCK)
    own = lambda start, size: np.arange(rows) == start + np.arange(size)[:, None]
    scores = lambda start: scale * images[start : start + BLOCK] @ texts.T + float(bias)
    of_rows, of_columns, value = [], np.zeros(rows), 0.0
    if loss == "softmax":  # scores are at most the scale, whose exponential is a number
        for start in blocks:
            exponentials = np.exp(scores(start) - scale)
            of_rows.append(exponentials.sum(1))
            of_columns += exponentials.sum(0)
        value = (np.log(np.concatenate(of_rows)).sum() + np.log(of_columns).sum()) / 2 + rows * scale
    dimages, dtexts, dscale, dbias = np.zeros_like(images), np.zeros_like(texts), 0.0, 0.0
    for i, start in enumerate(blocks):
        z = scores(start)
        mine = own(start, len(z))
        if loss == "softmax":
            value -= z[mine].sum()
            exponentials = np.exp(z - scale)
            dz = (exponentials / of_rows[i][:, None] + exponentials / of_columns) / 2 - mine
        else:
            signed = np.where(mine, -z, z)
            value += np.logaddexp(0, signed).sum()
            dz = np.where(mine, -1, 1) / (1 + np.exp(-signed))
        dimages[start : start + BLOCK] = scale * dz @ texts
        dtexts += scale * dz.T @ images[start : start + BLOCK]
        dscale, dbias = dscale + (dz * (z - bias)).sum(), dbias + dz.sum()
    gradients = dimages, dtexts, dscale, 0.0 if loss == "softmax" else dbias
    return value / rows, tuple(gradient / rows for gradient in gradients)


def compiled(loss, rows):
    """The value and the gradients, of rows over all devices."""
    import jax

    from hovle_jax.config import MeshConfig
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.sharding.placement import Placement
    from hovle_jax.training.losses.contrastive import contrastive
    from hovle_jax.training.losses.tokens import divide

    placement = Placement(make_mesh(MeshConfig(data=8, fsdp=8)))
    ring = placement.ring(rows)
    assert ring.size == DEVICES
    of_rows, whole = placement.sharding(ring.rows), placement.sharding()
    mean = lambda *given: divide(contrastive(*given, loss, ring))
    shardings = (of_rows, of_rows, whole, whole)
    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)), in_shardings=shardings)
    vectors = jax.ShapeDtypeStruct((rows, WIDTH), "float32")
    return step.lower(vectors, vectors, *[jax.ShapeDtypeStruct((), "float32")] * 2).compile(), shardings


def differences(loss, rows, step, shardings):
    """-> ([of the value, of each gradient], seconds)."""
    import jax
    import numpy as np

    given, started = inputs(rows, loss), time.perf_counter()
    value, gradients = jax.device_get(step(*map(jax.device_put, given, shardings)))
    seconds = time.perf_counter() - started
    expected, wanted = twin(loss, *given)
    found = [abs(value - expected) / abs(expected)]
    for gradient, exact in zip(gradients, wanted, strict=True):
        largest = np.abs(exact).max()
        found.append(np.abs(gradient - exact).max() / (largest or 1))
    return found, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help=f"compare {LARGE:,} rows too")
    parser.add_argument("--loss", choices=MOST, help="this one alone")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    os.environ.setdefault("NPROC", str(2 * DEVICES))  # a thread for each device, else collectives wait for ever
    print(
        f"{'loss':8} {'rows':>7} {'temporary MiB':>13} {'at most':>7} {'seconds':>7}  differences: value, "
        + ", ".join(NAMES)
    )
    for loss, most in MOST.items():
        if options.loss not in (None, loss):
            continue
        for rows in (SMALL, LARGE):
            step, shardings = compiled(loss, rows)
            memory = step.memory_analysis().temp_size_in_bytes / 2**20
            line = f"{loss:8} {rows:7,} {memory:13.2f} {most:7}"
            if rows == SMALL or options.full:
                found, seconds = differences(loss, rows, step, shardings)
                line += f" {seconds:7.1f}  " + " ".join(f"{each:.1e}" for each in found)
            print(line, flush=True)


if __name__ == "__main__":
    main()
