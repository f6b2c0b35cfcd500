"""Which devices take part in a collective together: the four ways in which XLA writes it.

    replica_groups={{0,1},{2,3}}                            written out ({}: all devices)
    replica_groups=[2,4]<=[4,2]T(1,0)                       2 groups of 4: iota of 8, as [4,2], transposed, as [2,4]
    replica_groups=mesh['x'=2,'y'=4] {'y'}                  groups along mesh axes; 'y':(2)2 is a part of an axis
    source_target_pairs={{0,1},{1,0}}                       of a permutation

Devices are numbered as in the mesh, row-major, whatever their hardware ids are.
"""

import re

import numpy as np

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?)\))? \{([^}]*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"([^,=]+)=(\d+)")


def replica_groups(attributes, devices):
    """The attributes of a collective -> list of integer arrays, one a group; `devices` = how many there are."""
    if found := _IOTA.search(attributes):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        return list(np.arange(np.prod(source)).reshape(source).transpose(order or range(len(source))).reshape(shape))
    if found := _MESH.search(attributes):
        return _along_axes(*found.groups())
    if found := _LISTS.search(attributes):
        groups = re.findall(r"\{([\d,]+)\}", found.group(1))
        return [np.asarray([int(n) for n in group.split(",")]) for group in groups] or [np.arange(devices)]
    return [np.arange(devices)]


def source_target_pairs(attributes):
    """The attributes of a collective-permute -> [n, 2] array."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", _PAIRS.search(attributes).group(1))
    return np.asarray(pairs, int).reshape(-1, 2)


def _along_axes(axes, order, chosen):
    """Mesh axes by name and size, the order of its devices (None: iota) and the axes along which groups lie."""
    sizes = {name.strip(): int(size) for name, size in _AXIS.findall(axes)}
    ids = _device_ids(order, int(np.prod(list(sizes.values()))))
    # A part 'y':(before)size of an axis y splits it into (before, size, rest).
    shape, wanted = [], []
    for name, size in sizes.items():
        parts = [part.strip() for part in chosen.split(",") if part.split(":")[0].strip() == name]
        if not parts:
            shape.append(size)
        elif ":" not in parts[0]:
            wanted.append(len(shape))
            shape.append(size)
        else:
            size_before = 1
            for before, count in sorted(tuple(map(int, re.search(r"\((\d+)\)(\d+)", part).groups())) for part in parts):
                wanted.append(len(shape) + 1)
                shape += [before // size_before, count]
                size_before = before * count
            shape.append(size // size_before)
    rest = [axis for axis in range(len(shape)) if axis not in wanted]
    count = int(np.prod([shape[axis] for axis in wanted]))
    return list(ids.reshape(shape).transpose(rest + wanted).reshape(-1, count))


def _device_ids(order, count):
    if order is None:
        return np.arange(count)
    if found := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", order):
        source, axes = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        return np.arange(count).reshape(source).transpose(axes or range(len(source))).reshape(-1)
    return np.asarray([int(n) for n in re.findall(r"\d+", order)])
