"""What the interop tests share: the program under test, the models, and figures computed without it."""

import json
import os
import pathlib
import subprocess
import unittest

import numpy as np
import onnxruntime as ort

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
QCC = pathlib.Path(os.environ.get("QCC_BIN", ROOT / "target/debug/qcc"))
TESTDATA = ROOT / "testdata/models"


def shared(name):
    """A model of the folder QCC_MODELS. Without the variable the test is skipped; with it, the file must be there."""
    folder = os.environ.get("QCC_MODELS")
    if folder is None:
        raise unittest.SkipTest("QCC_MODELS is not set")
    path = pathlib.Path(folder) / name
    assert path.exists(), f"{path} is missing"
    return path


def qcc(*args, fails=None):
    """Runs qcc and gives its stdout; with `fails`, it must exit with that status, and gives its stderr."""
    run = subprocess.run([QCC, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == (fails or 0), f"qcc {args}: exit {run.returncode}\n{run.stderr}\n{run.stdout}"
    return run.stderr if fails else run.stdout


def scores(*args):
    """What `qcc eval` says."""
    return json.loads(qcc("eval", *args, "--json"))


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(path, ids, batch=8):
    """ONNX Runtime's logits in float64, [rows, len, vocabulary]."""
    s = session(path)
    names = {i.name for i in s.get_inputs()}

    def run(x):
        feed = {"input_ids": x, "attention_mask": np.ones_like(x)}
        return s.run(["logits"], {k: v for k, v in feed.items() if k in names})[0]

    return np.concatenate([run(ids[i : i + batch]) for i in range(0, len(ids), batch)]).astype(np.float64)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def perplexity(x, ids):
    """Over all next-token positions of each row."""
    nll = -np.take_along_axis(log_softmax(x[:, :-1]), ids[:, 1:, None], -1)
    return float(np.exp(nll.mean()))


def divergence(p, q):
    """Mean over the predicting positions of KL(p || q)."""
    p, q = log_softmax(p[:, :-1]), log_softmax(q[:, :-1])
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def top1(x, ids):
    return float((x[:, :-1].argmax(-1) == ids[:, 1:]).mean())
