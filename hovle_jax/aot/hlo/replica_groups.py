"""Which devices take part in a collective together: the four ways in which XLA writes it.

    replica_groups={{0,1},{2,3}}                            written out ({}: all devices)
    replica_groups=[2,4]<=[4,2]T(1,0)                       2 groups of 4: iota of 8, as [4,2], transposed, as [2,4]
    replica_groups=mesh['x'=2,'y'=4] {'y'}                  groups along mesh axes; 'y':(2)2 is a part of an axis
    source_target_pairs={{0,1},{1,0},{2,2}}                 of a permutation, in which 2 sends nothing

Devices are numbered as in the mesh, row-major, whatever their hardware ids are.
"""

import math
import re

import numpy as np

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?)\))? \{([^}]*)\}")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_SOURCE = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")


def replica_groups(attributes: str, devices: int) -> list[np.ndarray]:
    """The attributes of a collective -> the devices of each group; `devices` = how many there are."""
    if found := _IOTA.search(attributes):
        return list(_iota(*found.groups()[1:]).reshape(_integers(found.group(1))))
    if found := _MESH.search(attributes):
        return _along_axes(*found.groups())
    found = _LISTS.search(attributes)
    groups = [np.unique(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", found.group(1))] if found else []
    return sorted(groups, key=len, reverse=True) or [np.arange(devices)]


def _along_axes(axes, order, chosen):
    """Mesh axes by name and size, the order of its devices (None: iota) and the axes along which groups lie.

    Each axis is split at the ends of what is chosen of it: 'y':(before)count has the sizes (before, count, rest).
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    shape, wanted = [], []
    for axis, size in sizes.items():
        at = 1
        for before, count in sorted((int(b or 1), int(n or size)) for name, b, n in parts if name == axis):
            wanted.append(len(shape) + 1)
            shape += [before // at, count]
            at = before * count
        shape.append(size // at)
    rest = [dimension for dimension in range(len(shape)) if dimension not in wanted]
    ids = _device_ids(order, math.prod(shape)).reshape(shape).transpose(rest + wanted)
    return list(ids.reshape(-1, math.prod(shape[dimension] for dimension in wanted)))


def _device_ids(order, count):
    if order is None:
        return np.arange(count)
    found = _SOURCE.search(order)
    return _iota(*found.groups()) if found else np.asarray(_integers(order))


def _iota(source, axes):
    """'4,2' and '1,0' (or None) -> the numbers from 0 on as [4, 2], transposed."""
    shape = _integers(source)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(axes) if axes else range(len(shape)))


def _integers(text):
    return [int(n) for n in re.findall(r"\d+", text)]
