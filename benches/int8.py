#!/usr/bin/env python3
"""Static INT8 of qcc beside that of ONNX Runtime's own quantizer: accuracy, speed, and what calibration takes.

    int8.py --models DIR [--qcc target/release/qcc] [--part accuracy|speed|calibration] [--model PATTERN]
            [--work DIR] [--json FILE] [--calib-rows N] [--peer-rows N]

Accuracy: both get the same calibration data, which is kept apart from what is scored where there is enough. The score
is what a model is for: digits named right (mnist), the float model's class found (resnet20, on generated pictures),
files named right (magika, whose 76 samples serve for both), digits sorted (nano_sort_gpt), perplexity (wikilm). `error`
is |y - y'|^2 / |y|^2 of the outputs against the float model, averaged over samples; it tells apart what scores do not.
All of it runs in ONNX Runtime. Speed: processor seconds of a run on one thread, so that what else the machine does
counts little; the files of a model take turns, and the median of the runs counts. Calibration: wikilm, processor seconds
and the peak of anonymous memory of the process, in which both run the model themselves. Each is run on two numbers of
rows, and the difference gives the time that a further row takes. The rival keeps every batch, so it gets few rows.
"""
import argparse
import fnmatch
import gzip
import json
import lzma
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests/interop"))

from common import session, surprise, log_softmax
from measure import measured

ROWS = "group=-1, symmetric=true, narrow=true"
WEIGHTS = {
    "8 bits": f"rtn{{bits=8, {ROWS}}}",
    "reduce-range": f"rtn{{bits=8, {ROWS}}},reduce-range",
    "7 bits": f"rtn{{bits=7, {ROWS}}}",
}
METHODS = ["minmax", "percentile", "percentile, percentile=99.9", "entropy", "mse"]
PEER = ["MinMax", "Percentile", "Entropy"]
PRESET = ["--preset", "static-int8"]


class Model:
    """A float model, its calibration inputs by name, those it is scored on, and how."""

    def __init__(self, name, path, calib, test, score, batch):
        self.name, self.path, self.calib, self.test, self.score, self.batch = name, path, calib, test, score, batch

    def outputs(self, path):
        """The first output for each sample, in order."""
        s, count = session(path), len(next(iter(self.test.values())))
        for i in range(0, count, self.batch):
            yield from s.run(None, {k: v[i : i + self.batch] for k, v in self.test.items()})[0].astype(np.float64)

    def judge(self, path):
        """The score of a file, and its error."""
        errors, found = [], []
        for y, z in zip(self.outputs(self.path), self.outputs(path)):
            errors.append(((y - z) ** 2).sum() / (y**2).sum())
            found.append(self.score(len(found), y, z))
        return np.mean(found), float(np.mean(errors))


def mnist(models, work):
    read = lambda name, skip: np.frombuffer(gzip.open(models / "mnist" / name).read()[skip:], np.uint8)
    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    x = ((x / 255 - 0.1307) / 0.3081).astype(np.float32)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    right = lambda i, y, z: z.argmax() == labels[i]
    return Model("mnist", models / "mnist/mnist.onnx", {"input.1": x[9872:]}, {"input.1": x[:9872]}, right, 1)


def resnet20(models, work):
    """Pictures of blocks of 7 x 7 in random colours, with noise."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((600, 3, 5, 5)).repeat(7, 2).repeat(7, 3)[..., :32, :32]
    x = (blocks + 0.2 * rng.standard_normal((600, 3, 32, 32))).astype(np.float32)
    same = lambda i, y, z: z.argmax() == y.argmax()
    return Model("resnet20", models / "resnet20/resnet20.onnx", {"input": x[:100]}, {"input": x[100:]}, same, 10)


def magika(models, work):
    data = np.load(models / "magika/eval_feats_v3_3.npz")
    x = data["bytes"].astype(np.int32)
    space = json.loads((models / "magika/standard_v3_3.config.min.json").read_text())["target_labels_space"]
    right = lambda i, y, z: space[z.argmax()] == data["labels"][i]
    return Model("magika", models / "magika/standard_v3_3.onnx", {"bytes": x}, {"bytes": x}, right, 4)


def nano_sort_gpt(models, work):
    """A sequence of six digits and the first five of the sorted ones: the last six positions tell what comes next."""
    x = np.load(models / "nano_sort_gpt/eval_ids.npy")
    feed = lambda x: {"input_ids": x, "attention_mask": np.ones_like(x)}
    digits = np.sort(x[:, :6], 1)
    right = lambda i, y, z: (z[5:].argmax(-1) == digits[i]).all()
    return Model("nano_sort_gpt", models / "nano_sort_gpt/legacy_sdpa_op17.onnx", feed(x[::6]), feed(x), right, 27)


def wikilm(models, work):
    path = work / "wikilm.onnx"
    if not path.exists():
        path.write_bytes(lzma.decompress((models / "wikilm/model.onnx.xz").read_bytes()))
    read = lambda name: np.load(models / "wikilm" / name)[:64]
    feed = lambda x: {"input_ids": x, "attention_mask": np.ones_like(x)}
    ids = read("eval_ids.npy")
    loss = lambda i, y, z: surprise(log_softmax(z[None, :-1]), ids[i : i + 1]).mean()
    return Model("wikilm", path, feed(read("calib_ids.npy")), feed(ids), loss, 4)


MODELS = [mnist, resnet20, magika, nano_sort_gpt, wikilm]


def made(command):
    """Whether a command succeeded, or the last line that it said."""
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no message"])[-1]


def ours(args, model, data, how, out):
    """Has qcc write a file."""
    samples = len(next(iter(model.calib.values())))
    return made([args.qcc, model.path, *how, "--calib", data, "--calib-samples", samples, "--quiet", "-o", out])


def theirs(model, data, method, reduced, ops, out):
    command = [sys.executable, HERE / "int8_peer.py", model.path, out, "--calib", data, "--method", method]
    command += ["--reduce-range"] if reduced else []
    return made(command + (["--ops", *ops] if ops else []))


def candidates(args, model, data, work):
    """What makes a file, its path, and the error that kept it from being made."""
    yield "as it was", model.path, None
    out = work / "preset.onnx"
    yield "qcc static-int8", out, ours(args, model, data, PRESET, out)
    for method in METHODS:
        for form, weights in WEIGHTS.items():
            out = work / f"qcc-{method.replace(', ', '-')}-{form.replace(' ', '-')}.onnx"
            passes = f"{weights},calibrate{{method={method}}},insert-fake-quant,pack-qdq"
            yield f"qcc {method}, {form}", out, ours(args, model, data, ["--pass", passes], out)
    for ops in (None, ["MatMul", "Gemm", "Conv"]):
        for method in PEER:
            for reduced in (False, True):
                label = f"ONNX Runtime {method}{', 7 bits' if reduced else ''}{', products' if ops else ''}"
                out = work / f"{label.replace(', ', '-').replace(' ', '-')}.onnx"
                yield label, out, theirs(model, data, method, reduced, ops, out)


def kept(args, model):
    """The folder of a model, with its calibration data."""
    work = args.work / model.name
    work.mkdir(parents=True, exist_ok=True)
    np.savez(work / "calib.npz", **model.calib)
    return work, work / "calib.npz"


def accuracy(args, model):
    work, data = kept(args, model)
    for label, path, error in candidates(args, model, data, work):
        row = {"model": model.name, "made by": label, "error": error}
        if error is None:
            try:
                score, off = model.judge(path)
                row["score"], row["off"] = float(np.exp(score) if model.name == "wikilm" else score), off
            except Exception as e:  # Whatever the runtime says of a file.
                row["error"] = str(e).splitlines()[0]
        cells = [row["error"][:100], ""] if row["error"] else [f"{row['score']:.4f}", f"{row['off']:.2e}"]
        print("| " + " | ".join([model.name, label, *cells]) + " |", flush=True)
        yield row


def speed(args, model):
    work, data = kept(args, model)
    files = [("as it was", model.path), ("qcc static-int8", work / "preset.onnx")]
    error = ours(args, model, data, PRESET, files[1][1])
    for ops in (None, ["MatMul", "Gemm", "Conv"]):
        out = work / f"speed-{'products' if ops else 'all'}.onnx"
        found = theirs(model, data, "MinMax", False, ops, out)
        label = f"ONNX Runtime{', products' if ops else ''}"
        if found:
            print(f"{model.name}: {label}: {found}", file=sys.stderr)
        else:
            files.append((label, out))
    if error:
        sys.exit(f"{model.name}: {error}")
    x = {k: v[: min(model.batch, 1)] for k, v in model.test.items()}
    running = [(label, session(path, threads=1), []) for label, path in files]
    for i in range(args.runs):
        for label, s, times in running[i % len(running) :] + running[: i % len(running)]:
            start = time.process_time()
            s.run(None, x)
            times.append(time.process_time() - start)
    base = statistics.median(running[0][2])
    for label, _, times in running:
        median = statistics.median(times)
        print(f"| {model.name} | {label} | {median * 1e3:.3f} ms | {median / base:.2f} |", flush=True)
        yield {"model": model.name, "made by": label, "seconds": median, "ratio": median / base}


def calibration(args):
    """wikilm on rows of 256 tokens."""
    model = wikilm(args.models, args.work)
    ids = np.concatenate([np.load(args.models / "wikilm" / f"{n}_ids.npy") for n in ("calib", "eval")])
    np.save(args.work / "rows.npy", ids)
    ways = []
    for method in ("percentile", "entropy"):
        ours = [args.qcc, model.path, "--pass", f"calibrate{{method={method}}}", "--dry-run", "--quiet"]
        ways.append((f"qcc {method}", args.calib_rows, ours))
    for method in PEER[1:]:
        for ops in ([], ["--ops", "MatMul"]):
            peer = [sys.executable, HERE / "int8_peer.py", model.path, "-", "--method", method, *ops]
            ways.append((f"ONNX Runtime {method}{', MatMul' if ops else ''}", args.peer_rows, peer))
    for label, most, command in ways:
        runs = []
        for count in (most // 4, most):
            few = args.work / "few.npz"
            np.savez(few, input_ids=ids[:count], attention_mask=np.ones_like(ids[:count]))
            ours = ["--calib", args.work / "rows.npy", "--calib-samples", count]
            flags = ours if label.startswith("qcc") else ["--calib", few]
            runs.append((count, measured([str(c) for c in [*command, *flags]])))
        (few, first), (many, last) = runs
        row = {"by": label, "rows": many, "error": last.err if last.status else None}
        row |= {"cpu": last.cpu, "seconds": last.seconds, "peak": last.peak}
        row["further"] = (last.cpu - first.cpu) / (many - few)
        row["further peak"] = (last.peak - first.peak) / (many - few)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--qcc", type=pathlib.Path, default=pathlib.Path("target/release/qcc"))
    parser.add_argument("--part", choices=["accuracy", "speed", "calibration"])
    parser.add_argument("--model", default="*", help="models whose name matches this")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--calib-rows", type=int, default=512)
    parser.add_argument("--peer-rows", type=int, default=16)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("target/int8"))
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.qcc = args.qcc.resolve()
    rows = []
    chosen = [make for make in MODELS if fnmatch.fnmatch(make.__name__, args.model)]
    if args.part in (None, "accuracy"):
        print("| model | made by | score | error |\n|---|---|---:|---:|")
        for make in chosen:
            rows += accuracy(args, make(args.models, args.work))
    if args.part in (None, "speed"):
        print("| model | made by | processor time | to float |\n|---|---|---:|---:|")
        for make in chosen:
            rows += speed(args, make(args.models, args.work))
    if args.part in (None, "calibration"):
        print("| by | rows | processor seconds | wall seconds | anonymous MiB | a further row: seconds | MiB |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for row in calibration(args):
            rows.append(row)
            cells = [f"{row['cpu']:.1f}", f"{row['seconds']:.1f}", f"{row['peak'] / 2**20:.0f}"]
            cells += [f"{row['further']:.3f}", f"{row['further peak'] / 2**20:.1f}"]
            if row["error"]:
                cells = [row["error"].strip().splitlines()[-1][:90], *[""] * 4]
            print("| " + " | ".join([row["by"], str(row["rows"]), *cells]) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
