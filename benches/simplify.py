#!/usr/bin/env python3
"""Compares what `canonicalize,fuse` makes of models with what onnxsim's `simplify` and ONNX Runtime's own optimizer make of them.

    simplify.py --models DIR [--qcc target/release/qcc] [--runs 40] [--only PATTERN] [--work DIR] [--json FILE]

For every model: nodes, the largest difference of the outputs, relative to the largest output, and the latency in ONNX
Runtime with its optimizations on and off, as a ratio to the model as it was (below 1: faster). All files of a model take
turns, one run each; the time is that of the one thread that runs, so that other work on the machine counts little, and the
median of the runs counts. ONNX Runtime's file is what it saves at its extended level.
DIR holds the folders of the models. onnxsim runs in an environment of its own, made from rivals-onnxsim.txt.
"""
import argparse
import collections
import fnmatch
import json
import lzma
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort

from environments import environment

MODELS = [
    ("wikilm/model.onnx.xz", (1, 128)),
    ("tinylm/model.onnx", (1, 128)),
    ("stories260k/*.onnx", (1, 128)),
    ("stories260k/external/*.onnx", (1, 128)),
    ("nano_sort_gpt/*.onnx", (1, 128)),
    ("magika/*.onnx", None),
    ("mnist/*.onnx", None),
    ("resnet20/*.onnx", None),
]
ON, OFF = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def session(path, level, save=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    if save:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(s, ids, shape):
    """Inputs of a session: token ids where there are some, else noise."""
    rng, out = np.random.default_rng(0), {}
    for i in s.get_inputs():
        dims = [d if isinstance(d, int) else 1 for d in i.shape]
        if ids is not None and "int64" in i.type:
            rows = ids[: shape[0], : shape[1]]
            if len(i.shape) == 2 and isinstance(i.shape[1], int):
                rows = rows[:, : i.shape[1]]
            out[i.name] = np.ones_like(rows) if "mask" in i.name else rows
        elif "int" in i.type:
            out[i.name] = rng.integers(0, 3, dims).astype("int64" if "64" in i.type else "int32")
        else:
            out[i.name] = rng.standard_normal(dims).astype(np.float32)
    return out


def nodes(path):
    """How many nodes there are, those of subgraphs included, but for constants."""

    def count(graph):
        inner = sum(count(a.g) for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
        return sum(n.op_type != "Constant" for n in graph.node) + inner

    return count(onnx.load(path, load_external_data=False).graph)


def made(command):
    """Whether a command succeeded, or the last line that it said."""
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no message"])[-1]


def candidates(args, source, work):
    """Files made of a model: what made each, and its path or the error."""
    yield "as it was", source, None
    raised = "canonicalize,raise-opset{version=23},fuse"
    for label, passes in (("canonicalize", "canonicalize"), ("qcc", "canonicalize,fuse"), ("qcc, opset 23", raised)):
        out = work / f"{label.replace(', ', '-').replace(' ', '-')}.onnx"
        yield label, out, made([args.qcc, source, "--pass", passes, "--allow-noop", "--quiet", "-o", out])
    out = work / "onnxsim.onnx"
    python, error = environment("onnxsim", args.work / "onnxsim")
    code = "import sys, onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(sys.argv[1]))[0], sys.argv[2])"
    yield "onnxsim", out, error or made([python, "-c", code, source, out])
    out = work / "ort.onnx"
    try:
        session(source, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, out)
        yield "ONNX Runtime, extended", out, None
    except Exception as e:  # Whatever it says of the model.
        yield "ONNX Runtime, extended", out, str(e).splitlines()[0]


def compare(args, label, source, ids, shape, work):
    """Rows of one model."""
    rows, running = [], []
    for name, path, error in candidates(args, source, work):
        row = {"model": label, "made by": name, "error": error}
        rows.append(row)
        if error:
            continue
        try:
            row["nodes"] = nodes(path)
            for mode, level in (("on", ON), ("off", OFF)):
                s = session(path, level)
                running.append((row, mode, s, feed(s, ids, shape), []))
        except Exception as e:
            row["error"] = str(e).splitlines()[0]
    expected = None
    for row, mode, s, x, _ in running:
        got = [np.asarray(y, np.float64) for y in s.run(None, x) if np.asarray(y).dtype.kind == "f"]
        expected = expected or got
        off = [np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in zip(expected, got)]
        row["difference"] = max(row.get("difference", 0.0), *off)
    for i in range(args.runs):
        turn = running[i % len(running) :] + running[: i % len(running)]
        for _, _, s, x, times in turn:
            start = time.thread_time()
            s.run(None, x)
            times.append(time.thread_time() - start)
    base = {}
    for row, mode, _, _, times in running:
        median = statistics.median(times)
        base.setdefault(mode, median)
        row[f"seconds {mode}"], row[f"ratio {mode}"] = median, median / base[mode]
    return rows


def sources(args):
    """Every model: its label, path, token ids if it reads some, how many of them, and a folder to work in."""
    for pattern, shape in MODELS:
        for path in sorted(args.models.glob(pattern)):
            label = str(path.relative_to(args.models)).split(".")[0]
            if args.only and not fnmatch.fnmatch(label, args.only):
                continue
            work = args.work / label
            work.mkdir(parents=True, exist_ok=True)
            plain = path
            if path.suffix == ".xz":
                plain = work / "model.onnx"
                plain.write_bytes(lzma.decompress(path.read_bytes()))
            ids = [p for p in (path.parent / "eval_ids.npy", path.parent.parent / "eval_ids.npy") if p.exists()]
            yield label, plain, np.load(ids[0]) if shape and ids else None, shape, work


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--qcc", type=pathlib.Path, default=pathlib.Path("target/release/qcc"))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", help="models whose label matches this")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("target/simplify"))
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = collections.defaultdict(list)
    print("| model | made by | nodes | difference | optimized | as it is |\n|---|---|---:|---:|---:|---:|")
    for label, *rest in sources(args):
        for row in compare(args, label, *rest):
            found[label].append(row)
            cells = [label, row["made by"]]
            if row["error"]:
                cells += [row["error"][:120], "", "", ""]
            else:
                cells += [row["nodes"], f"{row['difference']:.1e}"]
                cells += [f"{row[f'ratio {m}']:.2f} ({row[f'seconds {m}'] * 1e3:.2f} ms)" for m in ("on", "off")]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
