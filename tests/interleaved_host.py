"""One host of two on a mesh in which their devices take turns: python -m tests.interleaved_host COORDINATOR INDEX.

It makes its rows of a batch whose row r is [r, r, ...], puts them on the mesh, and prints what lies where, with sums
over the whole batch that need both hosts.
"""

import json
import sys

import jax
import numpy as np

from hovle_jax.config import MeshConfig
from hovle_jax.hosts import distributed
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement

ROWS, WIDTH = 16, 3


def turns(devices):
    """Devices of both hosts, one of each in turn."""
    by_host = [[d for d in devices if d.process_index == host] for host in range(2)]
    return [device for pair in zip(*by_host, strict=True) for device in pair]


def interleaved_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    return jax.sharding.Mesh(np.reshape(turns(jax.devices()), mesh.devices.shape), mesh.axis_names)


def main(coordinator, host):
    jax.distributed.initialize(coordinator, 2, host, initialization_timeout=60)
    placement = Placement(interleaved_mesh())
    rows, first = distributed.host_rows(placement.batch_sharding, ROWS)
    batch = placement.put_batch(np.repeat(np.asarray(rows, np.int32)[:, None], WIDTH, axis=1))
    places = {shard.index[0].start: np.asarray(shard.data)[:, 0].tolist() for shard in batch.addressable_shards}
    weighted = jax.jit(lambda x: (x[:, 0] * jax.numpy.arange(ROWS)).sum())(batch)
    found = dict(rows=rows, first=first, shape=batch.shape, places=places, weighted=int(weighted))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
