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


def session(path, exact=False, threads=0):
    """With `exact`, what ONNX Runtime fuses from DequantizeLinear and MatMul keeps float activations (accuracy_level 0).
    With `threads` 0 it takes one for each core."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def batches(s, ids, batch=8):
    """A session's logits in float64, [rows, len, vocabulary], for some rows at a time."""
    names = {i.name for i in s.get_inputs()}
    for i in range(0, len(ids), batch):
        x = ids[i : i + batch]
        feed = {"input_ids": x, "attention_mask": np.ones_like(x)}
        yield s.run(["logits"], {k: v for k, v in feed.items() if k in names})[0].astype(np.float64)


def logits(path, ids, batch=8):
    """ONNX Runtime's logits in float64, [rows, len, vocabulary]."""
    return np.concatenate(list(batches(session(path), ids, batch)))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def surprise(p, ids):
    """Minus the log-probability of every next token, given the log-probabilities of all but the last position."""
    return -np.take_along_axis(p, ids[:, 1:, None], -1)[..., 0]


def kl(p, q):
    """KL(p || q) at every position, of log-probabilities."""
    return (np.exp(p) * (p - q)).sum(-1)


def perplexity(x, ids):
    """Over all next-token positions of each row."""
    return float(np.exp(surprise(log_softmax(x[:, :-1]), ids).mean()))


def divergence(p, q):
    """Mean over the predicting positions of KL(p || q)."""
    return float(kl(log_softmax(p[:, :-1]), log_softmax(q[:, :-1])).mean())


def top1(x, ids):
    return float((x[:, :-1].argmax(-1) == ids[:, 1:]).mean())
