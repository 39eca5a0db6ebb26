"""Writes passes/testdata/searched.json: weights, and the grids that clipping without data and half-quadratic
quantization choose for them, computed group by group in float64 from the methods' definitions."""

import json
import pathlib

import numpy as np

SHRINKS = [1 - 0.05 * i for i in range(13)]
TRIED = {2: 13, 3: 9}  # how many of them; 7 for more bits
NEAR = [0.85, 0.9, 0.925, 0.95, 0.975, 1, 1.025, 1.05, 1.075, 1.1, 1.15]
P, TURNS, BETA, KAPPA = 0.75, 20, 10.0, 1.01


def plain(low, high, top, symmetric):
    """The grid of a range: scale and zero point."""
    if symmetric:
        largest = high if abs(high) > abs(low) else low
        return largest / -((top + 1) / 2), (top + 1) / 2
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / top
    return scale, min(np.floor(-low / scale + 0.5), top)


def codes(w, scale, zero, top):
    return np.floor(np.clip(w / scale + zero, 0, top) + 0.5)


def errors(w, scale, zero, top):
    return w - (codes(w, scale, zero, top) - zero) * scale


def refitted(w, target, scale, zero, top):
    """The least-squares scale of the nearest codes of `w`, for `target`."""
    c = codes(w, scale, zero, top) - zero
    return (c @ target) / (c @ c) if c.any() else scale


def clip(w, top, symmetric, tried):
    def cost(grid):
        return np.sum(errors(w, *grid, top) ** 2)

    grids = []
    for high in SHRINKS[:tried]:
        for low in [high] if symmetric else SHRINKS[:tried]:
            scale, zero = plain(w.min() * low, w.max() * high, top, symmetric)
            grids += [(scale, zero)] + ([(-scale, zero)] if symmetric else [])
    best = min(grids, key=cost)
    for _ in range(2):
        best = min(best, (refitted(w, w, *best, top), best[1]), key=cost)
    return best


def threshold(e, beta):
    """The generalized soft threshold of the l_p norm."""
    size = np.abs(e)
    with np.errstate(divide="ignore"):
        return np.sign(e) * np.maximum(size - size ** (P - 1) / beta, 0)


def hqq(w, top, symmetric, tried):
    def cost(grid):
        return np.sum(errors(w, *grid, top) ** 2)

    scale, zero = plain(w.min(), w.max(), top, symmetric)
    starts = [(scale, zero), (-scale, zero)]
    if not symmetric:
        z = zero
        for turn in range(TURNS):
            kept = w - scale * threshold(errors(w, scale, z, top) / scale, BETA * KAPPA**turn)
            z = np.mean(codes(w, scale, z, top) - kept / scale)
        starts[1] = (scale, np.clip(np.floor(z + 0.5), 0, top))
    starts.insert(0, clip(w, top, symmetric, tried))
    grids = starts[:1]
    for scale, zero in starts:
        for turn in range(TURNS):
            kept = w - scale * threshold(errors(w, scale, zero, top) / scale, BETA * KAPPA**turn)
            scale = refitted(w, kept, scale, zero, top)
            grids.append((scale, zero))
    grids = [min(grids, key=cost)]
    for shift in [0] if symmetric else [0, -1, 1]:
        for near in NEAR:
            scale, zero = grids[0][0] * near, np.clip(grids[0][1] + shift, 0, top)
            grids.append((scale, zero))
            for _ in range(2):
                scale = refitted(w, w, scale, zero, top)
                grids.append((scale, zero))
    return min(grids, key=cost)


def case(rng, bits, symmetric, n, k, group):
    w = rng.standard_t(4, (n, k)).astype(np.float32)
    w[1] *= 1e-3
    w[2] = np.abs(w[2])
    top = 2**bits - 1
    rows = [row[i : i + group].astype(np.float64) for row in w for i in range(0, k, group)]
    out = {"bits": bits, "symmetric": symmetric, "n": n, "k": k, "group": group, "w": w.tobytes().hex()}
    out["clip"] = [[float(x) for x in clip(row, top, symmetric, TRIED.get(bits, 7))] for row in rows]
    out["hqq"] = [[float(x) for x in hqq(row, top, symmetric, TRIED.get(bits, 7))] for row in rows]
    return out


rng = np.random.default_rng(11)
cases = [case(rng, bits, s, 5, 80, 32) for bits in (2, 3, 4, 6, 8) for s in (False, True)]
path = pathlib.Path(__file__).parent.parent / "passes/testdata/searched.json"
path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
