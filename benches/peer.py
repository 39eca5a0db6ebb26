#!/usr/bin/env python3
"""Measures qcc beside ONNX Runtime's own quantizer, in one run on one machine.

    peer.py [--qcc target/release/qcc] [--model big.onnx] [--lm wikilm.onnx] [--runs 3] [--work DIR]

Quantize: wall time from process start to the finished file for qcc (rtn,pack-int4, asymmetric, group 32); load,
quantize and save for ONNX Runtime's MatMulNBitsQuantizer in a process of its own, the imports of Python excluded; `cp`
of the model for scale. Memory: the peak of anonymous memory over the process, sampled.
Latency: ONNX Runtime on the float model, on qcc's file and on its own quantizer's. Best of --runs everywhere.
Interpreter (with --lm): the float model on 8 x 256 tokens with 2 threads, by qcc's interpreter and by ONNX Runtime, each in
a process of its own, turn by turn; the median of 5 runs, and the peak of resident memory (Python's included).
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from measure import measured

ORT_CHILD = """
import json, sys, time
import numpy, onnx, onnxruntime
from onnxruntime.quantization import matmul_nbits_quantizer as q
start = time.perf_counter()
model = onnx.load(sys.argv[1])
loaded = time.perf_counter()
quantizer = q.MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=False, accuracy_level=4)
quantizer.process()
done = time.perf_counter()
quantizer.model.save_model_to_file(sys.argv[2], False)
end = time.perf_counter()
print(json.dumps({"load": loaded - start, "quantize": done - loaded, "save": end - done, "total": end - start}))
"""


RUN_CHILD = """
import json, sys, time
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed, times = dict(numpy.load(sys.argv[2])), []
for _ in range(6):
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(times[1:])[2]}))
"""


def run(command):
    """Runs a command that must succeed: its output, wall seconds, and the peak of its anonymous memory."""
    r = measured(command)
    if r.status:
        sys.exit(f"{' '.join(map(str, command))}\n{r.err}")
    return r.out, r.seconds, r.peak


def best(runs, measure):
    """The fastest of several runs, by the second of what `measure` gives."""
    return min((measure() for _ in range(runs)), key=lambda r: r[1])


def remove(path):
    for p in path.parent.glob(path.name + "*"):
        p.unlink()


def quantize(args, work):
    model = args.model or work / "big.onnx"
    if not model.exists():
        print(f"writing {model}", flush=True)
        subprocess.run([sys.executable, pathlib.Path(__file__).with_name("make_model.py"), model], check=True)
    size = model.stat().st_size
    ours, theirs, copy = work / "qcc.onnx", work / "ort.onnx", work / "copy.onnx"

    def cp():
        remove(copy)
        return run(["cp", model, copy])

    def qcc():
        remove(ours)
        return run([args.qcc, model, "--pass", "rtn,pack-int4", "-o", ours, "--quiet"])

    def ort():
        remove(theirs)
        out, _, peak = run([sys.executable, "-c", ORT_CHILD, model, theirs])
        times = json.loads(out.splitlines()[-1])
        return times, times["total"], peak

    cp()  # warms the page cache
    _, t_cp, _ = best(args.runs, cp)
    remove(copy)
    times, t_ort, m_ort = best(args.runs, ort)
    print(f"model                 {size / 2**30:.2f} GiB")
    print(f"cp                    {t_cp:.2f} s")
    steps = ", ".join(f"{k} {v:.2f}" for k, v in times.items() if k != "total")
    print(f"ONNX Runtime          {t_ort:.2f} s ({steps}), {m_ort / 1e6:.0f} MB anonymous")
    if args.qcc.exists():
        _, t_qcc, m_qcc = best(args.runs, qcc)
        print(f"qcc                   {t_qcc:.2f} s, {m_qcc / 1e6:.0f} MB anonymous, {size / t_qcc / 1e9:.2f} GB/s")
        print(f"qcc / cp              {t_qcc / t_cp:.2f}")
        print(f"ONNX Runtime / qcc    {t_ort / t_qcc:.2f}")
        print(f"bytes                 {ours.stat().st_size} qcc, {theirs.stat().st_size} ONNX Runtime")
    if not args.model:
        remove(model)
    remove(ours)
    remove(theirs)


def latency(args, model, work, feeds):
    import numpy as np
    import onnxruntime as ort

    files = {"fp32": model}
    ours, theirs = work / "latency.qcc.onnx", work / "latency.ort.onnx"
    run([sys.executable, "-c", ORT_CHILD, model, theirs])
    files["ONNX Runtime's file"] = theirs
    if args.qcc.exists():
        run([args.qcc, model, "--pass", "rtn,pack-int4", "-o", ours, "--quiet"])
        files["qcc's file"] = ours
    for feed in feeds:
        sessions, times = {}, {name: [] for name in files}
        for name, path in files.items():
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            sessions[name].run(None, feed)
        # Turn by turn, so that whatever else the machine does falls on all of them alike.
        for _ in range(args.latency_runs):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feed)
                times[name].append(time.perf_counter() - start)
        shapes = " ".join(str(list(v.shape)) for v in list(feed.values())[:1])
        for name, t in times.items():
            ratio = np.median(t) / np.median(times["fp32"])
            print(f"  {model.name} {shapes} {name:20} median {np.median(t) * 1e3:8.3f} ms  x{ratio:.3f} of fp32")
    remove(ours)
    remove(theirs)


def interpreter(args, work):
    import numpy as np

    feed = work / "tokens.npz"
    ids = np.random.default_rng(0).integers(0, 4096, (8, 256))
    np.savez(feed, input_ids=ids, attention_mask=np.ones_like(ids))
    commands = {
        "ONNX Runtime": [sys.executable, "-c", RUN_CHILD, args.lm, feed],
        "qcc": [args.qcc, "run", args.lm, "--input", feed, "--repeat", "5", "--threads", "2", "--json"],
    }
    results = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{name} failed")
            results[name].append((json.loads(out)["seconds"], usage.ru_maxrss / 1024))
    reference = [min(r) for r in zip(*results["ONNX Runtime"])]
    for name, runs in results.items():
        seconds, mib = (min(r) for r in zip(*runs))
        ratios = f"x{seconds / reference[0]:.2f} of its time, x{mib / reference[1]:.2f} of its memory"
        print(f"  {args.lm.name} [8, 256] {name:13} {seconds:6.3f} s  {mib:6.0f} MiB  {ratios}")


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qcc", type=pathlib.Path, default=root / "target/release/qcc")
    parser.add_argument("--model", type=pathlib.Path, help="the model to quantize [default: 1 GiB, generated]")
    parser.add_argument("--lm", type=pathlib.Path, help="a language model whose latency to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--latency-runs", type=int, default=100)
    parser.add_argument("--work", type=pathlib.Path, help="folder for files [default: a temporary one]")
    parser.add_argument("--only", choices=["quantize", "latency", "interpreter"])
    args = parser.parse_args()
    work = args.work or pathlib.Path(tempfile.mkdtemp(prefix="qcc-bench-"))
    print(f"{os.cpu_count()} cores")
    try:
        if args.only in (None, "quantize"):
            quantize(args, work)
        if args.lm and args.only in (None, "interpreter"):
            interpreter(args, work)
        if args.only in (None, "latency"):
            import numpy as np

            layer = work / "layer.onnx"
            script = pathlib.Path(__file__).with_name("make_model.py")
            subprocess.run([sys.executable, script, layer, "--layers", "1"], check=True)
            rng = np.random.default_rng(0)
            feeds = [{"x": rng.standard_normal((n, 4096), dtype=np.float32)} for n in (1, 16)]
            latency(args, layer, work, feeds)
            if args.lm:
                ids = [rng.integers(0, 4096, (1, n)) for n in (1, 64)]
                latency(args, args.lm, work, [{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids])
    finally:
        if not args.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
