"""Seconds of a float32 training step of a CLIP on the CPU: this project's train_step against open_clip.

    pip install torch open_clip_torch && python -m tests.benchmarks.clip_step

Both read one checkpoint in open_clip's layout, with the same image tower and text tower, and learn from the same batch:
the softmax loss over it, clipping by the global norm, AdamW, the clamp of the temperature. open_clip runs as it trains,
eagerly with the fused AdamW. After three steps the losses must agree. Each side is a process of its own with as many
threads as there are cores; they take turns of a few steps.
Prints one JSON object: for each size the median seconds of a step, and open_clip's over ours.
"""

import dataclasses
import json
import os
import pathlib
import tempfile

import numpy as np

from tests.benchmarks import alternating

# name -> (open_clip's model_cfg, pairs of a batch)
TEXT = {"context_length": 32, "vocab_size": 4096}
SIZES = {
    "5M": ({
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
        "text_cfg": TEXT | {"width": 128, "heads": 2, "layers": 4},
    }, 64),
    "33M": ({
        "embed_dim": 256,
        "vision_cfg": {"image_size": 128, "layers": 8, "width": 384, "head_width": 64, "patch_size": 16},
        "text_cfg": TEXT | {"width": 256, "heads": 4, "layers": 8},
    }, 32),
}  # fmt: skip
RATE, B1, B2, EPSILON, DECAY, CLIP = 1e-3, 0.9, 0.98, 1e-6, 0.0, 1.0
MOST = np.log(100)


def pairs(model, rows, seed=1):
    """-> (images [N, S, S, 3] normalised, ids [N, T], each with its end, the highest id)."""
    rng, text = np.random.default_rng(seed), model["text_cfg"]
    side = model["vision_cfg"]["image_size"]
    ids = rng.integers(1, text["vocab_size"] - 2, (rows, text["context_length"])).astype(np.int32)
    ids[np.arange(rows), rng.integers(4, text["context_length"], rows)] = text["vocab_size"] - 1
    return rng.normal(size=(rows, side, side, 3)).astype(np.float32), ids


def open_clip_model(model):
    """A fresh one, the same each time."""
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision, text = CLIPVisionCfg(**model["vision_cfg"]), CLIPTextCfg(**model["text_cfg"])
    return CLIP(embed_dim=model["embed_dim"], vision_cfg=vision, text_cfg=text)


def peer_steps(model, rows):
    """Endless steps of open_clip; each gives its loss."""
    import torch
    from open_clip.loss import ClipLoss

    torch.set_num_threads(os.cpu_count() or 1)
    made, loss_of = open_clip_model(model).train(), ClipLoss()
    parameters = list(made.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(B1, B2), eps=EPSILON, weight_decay=DECAY, fused=True)
    images, ids = pairs(model, rows)
    images, ids = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(ids).long()
    while True:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(*made(images, ids))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            made.logit_scale.clamp_(0, MOST)
        yield loss.item()


def checkpoint(model, folder):
    """Writes the fresh model in open_clip's layout -> the folder."""
    from safetensors.torch import save_file

    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    state = {name: value.contiguous() for name, value in open_clip_model(model).state_dict().items()}
    save_file({n: v for n, v in state.items() if n != "attn_mask"}, folder / "open_clip_model.safetensors")
    return folder


def our_steps(model, rows):
    """Endless steps of the stage `contrast`; each gives its loss."""
    import jax

    from hovle_jax import recipes
    from hovle_jax.config import OptimizerConfig, RunConfig
    from hovle_jax.formats.families import open_checkpoint
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.training.setup import build
    from hovle_jax.training.stages import STAGES
    from hovle_jax.training.state import make_state
    from hovle_jax.training.step import train_step

    run = RunConfig.from_dict(recipes.base("contrast", "tiny").to_dict())
    optimizer = OptimizerConfig(RATE, 0, 1.0, DECAY, B1, B2, EPSILON, CLIP)
    with tempfile.TemporaryDirectory() as folder:
        read = open_checkpoint(checkpoint(model, pathlib.Path(folder)))
        values = read.load()
    data = dataclasses.replace(run.data, batch_size=rows)
    run = dataclasses.replace(run, clip=read.config, optimizer=optimizer, data=data)
    made = build(run, make_mesh(run.mesh))
    params = jax.tree.map(
        lambda leaf, value: jax.device_put(value, leaf.sharding), made.abstract_params()["clip"], values
    )
    state = make_state(STAGES[run.stage], made, {"clip": params})
    images, ids = pairs(model, rows)
    batch = made.placement.put_batch({"tiles": images[:, None], "tokens": ids})
    while True:
        state, metrics = train_step(state, batch, stage=run.stage, run=made)
        jax.block_until_ready(state)
        yield float(metrics["loss"])


SIDES = {"ours": our_steps, "open_clip": peer_steps}


if __name__ == "__main__":
    alternating.main(__doc__, __file__, SIDES, SIZES)
