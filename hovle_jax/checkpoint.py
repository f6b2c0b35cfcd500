"""What a run has saved: lists it, looks into it, compares it with its lists of files and with other saves.

    python -m hovle_jax.checkpoint list runs/instruct                      # steps, sizes, times; whole or damaged
    python -m hovle_jax.checkpoint inspect runs/instruct/checkpoints/500   # every array: shape, type, norm
    python -m hovle_jax.checkpoint verify runs/instruct                    # reads every byte; status 1 at damage
    python -m hovle_jax.checkpoint diff runs/a/model runs/b/model          # bit-equal, or the largest difference

A place is RUN/checkpoints/STEP, RUN/model (of an import too), or RUN: for its newest save (list, verify: for all).
`verify` ends with status 1 where something is damaged, `diff` where something differs. Nothing is changed.
"""

import json
import sys
import time

from absl import flags

from hovle_jax.system import command_line

USAGE = "list RUN | inspect PLACE | verify PLACE | diff PLACE PLACE"
JSON = flags.DEFINE_bool("json", False, "Print one JSON object")


def list_(run: str) -> None:
    from hovle_jax.training import inspecting

    rows = [saved.row() for saved in inspecting.saved_in(run)]
    _print({"saves": rows}, [f"{'':12}{'bytes':>16}  {'saved at':19}  state", *map(_line, rows)])


def _line(row):
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
    metrics = "".join(f"  {name} {value:.5g}" for name, value in row["held_out"].items())
    return f"{row['name']:12}{row['bytes']:16,}  {at}  {row['state']}{metrics}"


def inspect(place: str) -> None:
    from hovle_jax.training import inspecting

    saved = inspecting.find(place)
    rows = {
        path: {"shape": leaf.shape, "dtype": leaf.dtype, "norm": inspecting.norm(leaf.read())}
        for path, leaf in inspecting.leaves(saved).items()
    }
    width = max(map(len, rows), default=0)
    lines = [f"{saved.name} in {saved.folder}: {len(rows)} arrays"]
    for path, row in rows.items():
        lines.append(f"{path:{width}}  {row['dtype']:9} {' x '.join(map(str, row['shape'])):16} norm {row['norm']:.6g}")
    _print({"place": str(saved.folder), "arrays": rows}, lines)


def verify(place: str) -> None:
    from hovle_jax.training import inspecting

    one = inspecting.find(place)
    saves = [one] if str(one.folder) == str(place).rstrip("/") else inspecting.saved_in(place)
    found = {str(saved.folder): saved.damage() for saved in saves}
    lines = []
    for saved in saves:
        damage = found[str(saved.folder)]
        unlisted = "not listed: an older version wrote it, and there is nothing to compare it with"
        lines.append(f"{saved.folder}: {'DAMAGED' if damage else 'whole' if saved.has_list else unlisted}")
        lines += [f"  {line}" for line in damage]
    _print({"damage": found}, lines)
    if any(found.values()):
        sys.exit(1)


def diff(place: str, other: str) -> None:
    from hovle_jax.training import inspecting

    first, second = (inspecting.leaves(inspecting.find(where)) for where in (place, other))
    rows = {}
    for path in [*first, *(path for path in second if path not in first)]:
        if path not in first or path not in second:
            rows[path] = f"only in {place if path in first else other}"
        elif first[path].shape != second[path].shape:
            rows[path] = f"shape {list(first[path].shape)}, not {list(second[path].shape)}"
        else:
            gap = inspecting.difference(first[path].read(), second[path].read())
            rows |= {path: f"differs by up to {gap:.3g}"} if gap else {}
    width = max(map(len, rows), default=0)
    equal = len(first.keys() & second.keys()) - sum("only in" not in text for text in rows.values())
    lines = [*(f"{path:{width}}  {text}" for path, text in rows.items()), f"{equal} arrays are bit-equal"]
    _print({"different": rows, "equal": equal}, lines)
    if rows:
        sys.exit(1)


def _print(found, lines):
    print(json.dumps(found) if JSON.value else "\n".join(lines))


ACTIONS = {"list": (list_, 1), "inspect": (inspect, 1), "verify": (verify, 1), "diff": (diff, 2)}


def main(arguments: list[str]) -> None:
    command_line.dispatch(ACTIONS, arguments, f"python -m hovle_jax.checkpoint {USAGE}")


if __name__ == "__main__":
    command_line.run(main, USAGE, platform="cpu")
