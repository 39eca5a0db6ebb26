#!/usr/bin/env python3
"""Measures every weight-only method of qcc beside the rivals, in one run: what the quantized models are worth in ONNX
Runtime, and how large their files are.

    quality.py --models DIR [--qcc target/release/qcc] [--only quality|mixed|time|memory] [--model NAME] [--width 4g32]
               [--skip PATTERN] [--work DIR] [--json FILE] [--fresh]

Quality: perplexity, and the KL divergence from the float model (mean over the predicting positions, in nats), both of
a float64 log-softmax over ONNX Runtime's logits with float activations (accuracy_level 0). Calibration and evaluation
data are the rows that MODELS names. Bits per weight are bytes x 8 / weights of all linear layers, once for the whole
file and once for what the layers' weights are made from: codes, scales, zero points, and floats where a layer was left
alone. Seconds: of the process for qcc, of loading, quantizing and saving for the rivals, whose imports are excluded.
Memory: the peak of anonymous memory of the process.

DIR holds wikilm/ and stories260k/. Each rival runs in an environment of its own, made from rivals-*.txt. What cannot be
made or fails has a row that says why. Results are kept in --work by the content of program, model, data and options, so
that another run measures only what has changed; --fresh measures everything again.
"""
import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import json
import lzma
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests/interop"))

import variants
from common import batches, kl, log_softmax, session, surprise
from contents import contents
from environments import environment
from measure import measured

WIDTHS = {"4g128": (4, 128), "4g32": (4, 32), "3g32": (3, 32), "2g32": (2, 32)}


@dataclass(frozen=True)
class Model:
    """A float model, and the rows of its data that everything is measured on."""

    name: str
    folder: str
    file: str
    calib_rows: int
    eval_rows: int
    perplexity: float
    widths: tuple
    change: object = None


ALL = tuple(WIDTHS)
MODELS = [
    Model("wikilm", "wikilm", "model.onnx.xz", 64, 64, 47.0549, ALL),
    Model("stories260k", "stories260k", "dynamo_sdpa_op18.onnx", 64, 128, 4.7172, ("4g32",)),
    Model("wikilm, outliers", "wikilm", "model.onnx.xz", 64, 64, 47.0549, ("4g32", "3g32"), variants.outliers),
]

# Pipelines of qcc, and further flags behind a space. `@` stands for a width's options, such as bits=4,group=32.
PIPELINES = [
    "rtn{@,symmetric=true}",
    "rtn{@}",
    "rtn{@,clip=true}",
    "rtn{@,hqq=true}",
    "awq{@}",
    "gptq{@,symmetric=true}",
    "gptq{@,sequential=off}",
    "gptq{@,sequential=block}",
    "gptq{@}",
    "awq{@},gptq{@}",
    "awq{@},gptq{@} --tied shared",
]

# Mixed precision at the bytes, `$`, of a uniform file.
UNIFORM = "gptq{@}"
MIXED = [f"mixed{{{o}}} --measure-samples 8" for o in ("size=$,method=gptq", "size=$", "size=$,solver=greedy")]

# What is timed on one layer, and what is watched on a wide one.
TIMED = ["rtn", "awq", "gptq", "gptq{sequential=off}"]
TIMED_RIVALS = ["onnxsim GPTQ, symmetric"]
WIDE = ["rtn{only=[wide]}", "awq{only=[wide]}", "gptq{only=[wide]}"]


@dataclass(frozen=True)
class Rival:
    """A method of a rival. `forms` of the model that it is given: as exported, raised to opset 21, or plain."""

    label: str
    method: str
    symmetric: bool = False
    options: dict = field(default_factory=dict, hash=False)
    forms: tuple = ("plain",)


# They leave a head behind a Transpose alone, and onnxsim all of a model older than opset 21. Bytes and quality compare
# where every weight is the constant operand of a product; some are measured on the other forms too, to show the loss.
BOTH, THREE = ("exported", "plain"), ("exported", "raised", "plain")
RIVALS = [
    Rival("ONNX Runtime RTN, symmetric", "ort-rtn", symmetric=True, forms=BOTH),
    Rival("ONNX Runtime RTN", "ort-rtn", forms=BOTH),
    Rival("ONNX Runtime k_quant", "ort-kquant"),
    Rival("ONNX Runtime HQQ", "ort-hqq"),
    Rival("ONNX Runtime GPTQ", "ort-gptq"),
    Rival("ONNX Runtime GPTQ, act-order, mse", "ort-gptq", options={"actorder": True, "mse": True}),
    Rival("onnx-neural-compressor RTN", "onc-rtn", forms=BOTH),
    Rival("onnx-neural-compressor AWQ", "onc-awq"),
    Rival("onnx-neural-compressor GPTQ", "onc-gptq"),
    Rival("onnx-neural-compressor GPTQ, act-order, mse", "onc-gptq", options={"actorder": True, "mse": True}),
    Rival("onnxsim int4, symmetric", "onnxsim-int4", symmetric=True, forms=THREE),
    Rival("onnxsim MatMulNBits, symmetric", "onnxsim-nbits", symmetric=True),
    Rival("onnxsim HQQ", "onnxsim-hqq"),
    Rival("onnxsim GPTQ, symmetric", "onnxsim-gptq", symmetric=True),
    Rival("onnxsim AWQ, symmetric", "onnxsim-awq", symmetric=True),
]


@dataclass
class Row:
    """One measured file. `error` says why there is none."""

    model: str
    width: str
    label: str
    form: str
    error: str | None = None
    seconds: float | None = None
    cpu: float | None = None
    peak: int | None = None
    bytes: int | None = None
    contents: dict | None = None
    perplexity: float | None = None
    kl: float | None = None


class Work:
    """Where files and results are kept, by the content of what they come from."""

    def __init__(self, folder, fresh=False):
        self.folder, self.fresh, self.made = folder, fresh, set()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind, *key):
        text = json.dumps([kind, *key], sort_keys=True, default=str)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def result(self, path, make):
        """What `make` gave when it last ran for this path: JSON."""
        path = path.with_suffix(".json")
        if path not in self.made and (self.fresh or not path.exists()):
            write(path, json.dumps(make(), indent=1).encode())
        self.made.add(path)
        return json.loads(path.read_text())

    def file(self, path, make):
        """A file that `make` writes, given a path."""
        if not path.exists():
            part = path.with_name(path.name + ".part")
            make(part)
            part.rename(path)
        return path


def write(path, data):
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.rename(path)


@functools.cache
def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Bench:
    def __init__(self, args):
        self.args = args
        self.work = Work(args.work, args.fresh)
        self.environments = {}

    # Models and data

    def form(self, model, form):
        """The path of a model in one of its forms."""
        source = self.args.models / model.folder / model.file
        change = {"exported": lambda m: m, "raised": variants.raised, "plain": variants.plain}[form]
        key = [digest(source), digest(HERE / "variants.py"), model.change.__name__ if model.change else None, form]

        def make(path):
            data = lzma.decompress(source.read_bytes()) if source.suffix == ".xz" else source.read_bytes()
            m = variants.bare(onnx.load_from_string(data))
            onnx.save(change(model.change(m) if model.change else m), path)

        return self.work.file(self.work.path("model", *key).with_suffix(".onnx"), make)

    def data(self, model, name):
        return self.args.models / model.folder / f"{name}_ids.npy"

    def logits(self, model):
        """The float model's logits on the evaluation rows, in float32: [rows, len, vocabulary]."""
        source = self.form(model, "exported")

        def make(path):
            found = batches(session(source, threads=self.args.threads), self.rows(model))
            with open(path, "wb") as f:
                np.save(f, np.concatenate([x.astype(np.float32) for x in found]))

        key = [digest(source), digest(self.data(model, "eval")), model.eval_rows]
        return np.load(self.work.file(self.work.path("logits", *key).with_suffix(".npy"), make), mmap_mode="r")

    def rows(self, model):
        return np.load(self.data(model, "eval"))[: model.eval_rows]

    def evaluated(self, path, model):
        """Perplexity and KL divergence of a file on the model's evaluation rows."""
        key = [digest(path), digest(self.data(model, "eval")), model.eval_rows, onnxruntime.__version__]

        def make():
            ids, reference = self.rows(model), self.logits(model)
            nll, divergence = [], []
            s = session(path, exact=True, threads=self.args.threads)
            # Row by row, which the processor's caches hold.
            for i, x in enumerate(row for batch in batches(s, ids) for row in batch):
                p, q = log_softmax(reference[i, :-1].astype(np.float64)), log_softmax(x[:-1])
                nll.append(surprise(q[None], ids[i : i + 1]).mean())
                divergence.append(kl(p, q).mean())
            return {"perplexity": float(np.exp(np.mean(nll))), "kl": float(np.mean(divergence))}

        return self.work.result(self.work.path("quality", *key, digest(self.form(model, "exported"))), make)

    # Quantizing

    def environment(self, name):
        """The Python of a rival's environment, or the error that keeps it from being made."""
        if name not in self.environments:
            folder = self.work.path(f"env-{name}", digest(HERE / f"rivals-{name}.txt"))
            python, error = environment(name, folder)
            self.environments[name] = python, error and reason(error)
        return self.environments[name]

    def quantized(self, key, command, out, env=None):
        """Runs a command that writes `out`: seconds, memory, and the error if there is one."""

        def make():
            print(" ".join(map(str, command)), file=sys.stderr, flush=True)
            out.unlink(missing_ok=True)
            run = measured(command, env, self.args.limit)
            error = f"more than {self.args.limit} s" if run.status == -9 else reason(run.err)
            inner = re.search(r'\{"seconds": (\S+)\}\s*$', run.out)
            seconds = float(inner[1]) if inner else run.seconds
            return {"error": error if run.status else None, "seconds": seconds, "cpu": run.cpu, "peak": run.peak}

        return self.work.result(self.work.path("run", *key), make)

    def qcc(self, passes, flags, source, calib, rows):
        """The file that qcc makes, and what that took."""
        threads = str(self.args.threads)
        key = [digest(self.args.qcc), digest(source), digest(calib), rows, passes, flags]
        out = self.work.path("qcc", *key).with_suffix(".onnx")
        command = [self.args.qcc, source, "--pass", f"{passes},pack-int4", "--profile", "ort-cpu-exact", "-o", out]
        command += ["--quiet", "--calib", calib, "--calib-samples", str(rows), "--threads", threads, *flags]
        return out, self.quantized(key, command, out)

    def pipeline(self, model, width, pipeline):
        """The row of a pipeline."""
        bits, group = WIDTHS[width]
        passes, *flags = pipeline.replace("@", f"bits={bits},group={group}").split(" ")
        label = " ".join([f"qcc `{passes}`", *flags])
        source, calib = self.form(model, "exported"), self.data(model, "calib")
        make = functools.partial(self.qcc, passes, flags, source, calib, model.calib_rows)
        return self.row(model, width, label, "exported", make)

    def rival(self, model, rival, form, width):
        return self.rival_on(rival, self.form(model, form), self.data(model, "calib"), model.calib_rows, width)

    def rival_on(self, rival, source, calib, rows, width):
        """The file that a rival makes, and what that took."""
        bits, group = WIDTHS[width]
        tool = rival.method.split("-")[0]
        python, error = self.environment(tool)
        if error:
            return None, {"error": f"cannot be installed: {error}"}
        options = ["--bits", bits, "--group", group, "--rows", rows, "--options", json.dumps(rival.options)]
        options += ["--symmetric"] if rival.symmetric else []
        files = [HERE / f"rivals-{tool}.txt", source, calib]
        key = [rival.method, *map(digest, files), *options]
        out = self.work.path("rival", *key).with_suffix(".onnx")
        script, threads = HERE / "rivals.py", str(self.args.threads)
        options += ["--calib", calib, "--threads", threads]
        command = [python, script, rival.method, source, out, *map(str, options)]
        env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PATH": "/usr/bin:/bin"}
        return out, self.quantized(key, command, out, env)

    def row(self, model, width, label, form, made):
        """The row of a file that `made` gives."""
        if self.skipped(label):
            return Row(model.name, width, label, form, "skipped")
        out, run = made()
        if run["error"]:
            return Row(model.name, width, label, form, run["error"])
        source = self.form(model, form)
        found = self.work.path("contents", digest(out), digest(source), digest(HERE / "contents.py"))
        held = self.work.result(found, lambda: dataclasses.asdict(contents(out, source)))
        try:
            quality = self.evaluated(out, model)
        except Exception as e:  # Whatever ONNX Runtime says of a file that it does not run.
            quality = {"error": reason(str(e))}
        sizes = {"bytes": out.stat().st_size, "contents": held}
        return Row(model.name, width, label, form, **{**run, **sizes, **quality})

    def quality(self, model):
        """All methods at all widths of a model."""
        for form in self.args.form or THREE:
            scores = self.evaluated(self.form(model, form), model)
            if abs(scores["perplexity"] - model.perplexity) > 1e-3:
                sys.exit(f"{model.name}, {form}: perplexity {scores['perplexity']:.4f}, expected {model.perplexity}")
        for width in self.widths(model):
            for pipeline in PIPELINES:
                yield self.pipeline(model, width, pipeline)
            for rival in RIVALS:
                for form in [f for f in rival.forms if not self.args.form or f in self.args.form]:
                    made = functools.partial(self.rival, model, rival, form, width)
                    yield self.row(model, width, rival.label, form, made)

    def mixed(self, model):
        """Mixed precision beside a uniform file of as many bytes."""
        uniform = self.pipeline(model, "4g32", UNIFORM)
        yield uniform
        for pipeline in MIXED:
            yield self.pipeline(model, "4g32", pipeline.replace("$", str(uniform.bytes or 0)))

    def skipped(self, label):
        return any(fnmatch.fnmatch(label, p) for p in self.args.skip)

    def widths(self, model):
        return [w for w in model.widths if not self.args.width or w in self.args.width]

    # One layer

    def layer(self, name, make):
        """A model that `make` gives with the inputs to calibrate it on, as files."""
        model, data = [self.work.path(name, digest(HERE / "variants.py")).with_suffix(s) for s in (".onnx", ".npz")]
        if not (model.exists() and data.exists()):
            m, feed = make()
            onnx.save(m, model)
            np.savez(data, **feed)
        return model, data

    def time(self):
        """One layer of 4096 x 4096 and 2,048 rows: seconds, memory, and the error of the output."""
        size, rows = 4096, 2048
        model, data = self.layer("layer", lambda: variants.layer(size, rows))
        x = dict(np.load(data))
        y = session(model).run(None, x)[0].astype(np.float64)
        print(f"\n## One layer of {size} x {size}, {rows} rows\n\n| method | s | CPU s | peak MB | output error |")
        print("|---|---:|---:|---:|---:|")
        for label, out, run in self.timed(model, data, rows):
            error = run["error"]
            if not error:
                got = session(out, exact=True).run(None, x)[0]
                error = f"{np.linalg.norm(got - y) / np.linalg.norm(y):.4%}"
            seconds, cpu, peak = (run.get(k) or 0 for k in ("seconds", "cpu", "peak"))
            print(f"| {label} | {seconds:.2f} | {cpu:.1f} | {peak / 1e6:.0f} | {error} |", flush=True)
            yield {"model": "layer", "label": label, **run, "output_error": error}

    def timed(self, model, data, rows):
        for passes in TIMED:
            yield f"qcc `{passes}`", *self.qcc(passes, [], model, data, rows)
        for rival in RIVALS:
            if rival.label in TIMED_RIVALS and not self.skipped(rival.label):
                yield rival.label, *self.rival_on(rival, model, data, rows, "4g32")

    def memory(self):
        """The peak of anonymous memory on a layer with as many inputs as the widest of a 7 B model."""
        inner, out, tokens, rows = 11008, 4096, 2048, self.args.rows
        model, data = self.layer(f"wide-{rows}", lambda: variants.wide(inner, out, rows, tokens))
        print(f"\n## One layer of {inner} x {out}, {rows} x {tokens} tokens: limit 2000 MB\n\n| method | peak MB | s |")
        print("|---|---:|---:|")
        for passes in WIDE:
            _, run = self.qcc(passes, [], model, data, rows)
            cells = run["error"] or f"{run['peak'] / 1e6:.0f} | {run['seconds']:.1f}"
            print(f"| qcc `{passes}` | {cells} |", flush=True)
            yield {"model": "wide", "label": f"qcc `{passes}`", **run}


def reason(text):
    """What an error message says is wrong, on one line: qcc's up to its picture, else the line that names an error."""
    if "×" in text:
        said = re.split(r"╭|help:", text.split("×", 1)[1])[0]
        return " ".join(said.replace("│", " ").split())[:200]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Progress:" not in line] or ["no message"]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (named or lines)[-1].replace("|", "/")[:200]


FORMS = {"exported": "as exported", "raised": "opset 21", "plain": "plain head"}
HEAD = (
    "| method | model | quantized | perplexity | KL | of rtn's | MB | unused MB | bits/weight: file | layers | s | peak MB |"
)


def table(rows):
    """The markdown table of one model, in a part for each width."""
    lines = []
    for width in dict.fromkeys(r.width for r in rows):
        bits, group = WIDTHS[width]
        here = [r for r in rows if r.width == width]
        plain = f"qcc `rtn{{bits={bits},group={group}}}`"
        rtn = next((r.kl for r in here if r.label == plain), None)
        lines += [f"\n**{bits} bits, groups of {group}**\n", HEAD, "|---|---|---|" + "---:|" * 9]
        lines += [line(r, rtn) for r in here]
    return "\n".join(lines)


def line(r, rtn):
    """A row; `rtn` is the divergence of qcc's rounding to nearest."""
    start = f"| {r.label} | {FORMS[r.form]} |"
    if r.perplexity is None:
        return f"{start} {r.error} |" + " |" * 9
    c = r.contents
    layers = f"{c['quantized']} of {c['layers']}" + (f", {c['rewritten']} simulated" if c["rewritten"] else "")
    cells = [layers, f"{r.perplexity:.4f}", f"{r.kl:.5f}", f"{r.kl / rtn:.2f}" if rtn else ""]
    cells += [f"{r.bytes / 1e6:.2f}", f"{c['unused'] / 1e6:.2f}"]
    cells += [f"{n * 8 / c['weights']:.3f}" for n in (r.bytes, c["bytes"])]
    cells += [f"{r.seconds:.1f}", f"{r.peak / 1e6:.0f}"]
    return start + "".join(f" {cell} |" for cell in cells)


def main():
    root = HERE.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, required=True, help="folder of wikilm/ and stories260k/")
    parser.add_argument("--qcc", type=pathlib.Path, default=root / "target/release/qcc")
    parser.add_argument("--work", type=pathlib.Path, default=root / "target/quality", help="where to keep results")
    parser.add_argument("--only", choices=["quality", "mixed", "time", "memory"], default="quality")
    parser.add_argument("--model", action="append", help="only this model; may be given more than once")
    parser.add_argument("--width", action="append", choices=WIDTHS, help="only this width")
    parser.add_argument("--form", action="append", choices=FORMS, help="give the rivals only this form of the models")
    parser.add_argument("--skip", action="append", default=[], help="methods to leave out, such as 'onnxsim*'")
    parser.add_argument("--rows", type=int, default=128, help="rows of 2,048 tokens of --only memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a method is given up")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    bench, found = Bench(args), []
    if args.only in ("time", "memory"):
        found = list(getattr(bench, args.only)())
    for model in MODELS if args.only in ("quality", "mixed") else []:
        if args.model and model.name not in args.model:
            continue
        rows = list(getattr(bench, args.only)(model))
        found += map(dataclasses.asdict, rows)
        print(f"\n## {model.name}: fp32 perplexity {model.perplexity}\n{table(rows)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
