#!/usr/bin/env python3
"""Quantizes a model with a rival of qcc: run by quality.py, in an environment that holds that rival.

    rivals.py METHOD IN OUT [--bits 4] [--group 32] [--symmetric] [--calib FILE] [--rows 64] [--threads 2]
              [--options JSON]

Calibration data is token ids (.npy, int64 [rows, tokens]) or the inputs themselves (.npz), fed 8 rows at a time. Prints
the seconds of loading, quantizing and saving as JSON; imports are excluded. A rival that fails ends with its own error.
"""
import argparse
import json
import logging
import time

import numpy as np
import onnx

BATCH = 8


class Reader:
    """Calibration batches, as ONNX Runtime and onnx-neural-compressor want to read them."""

    def __init__(self, batches):
        self.batches = batches
        self.rewind()

    def rewind(self):
        self.left = iter(self.batches)

    def get_next(self):
        return next(self.left, None)

    def __iter__(self):
        return iter(self.batches)


def calibration(args, model):
    """A list of feeds."""
    if args.calib is None:
        return []
    if args.calib.endswith(".npz"):
        data = dict(np.load(args.calib))
    else:
        ids = np.load(args.calib)[: args.rows]
        data = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    names = [i.name for i in model.graph.input]
    rows = len(data[names[0]])
    return [{n: data[n][i : i + BATCH] for n in names} for i in range(0, rows, BATCH)]


# ONNX Runtime


def ort_quantizer(args, model, config=None):
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    options = {"algo_config": config(q)} if config else {"bits": args.bits}
    quantizer = q.MatMulNBitsQuantizer(model, block_size=args.group, is_symmetric=args.symmetric, **options)
    quantizer.process()
    return quantizer.model.model


def ort_rtn(args, model):
    return ort_quantizer(args, model)


def ort_hqq(args, model):
    return ort_quantizer(args, model, lambda q: q.HQQWeightOnlyQuantConfig(block_size=args.group, bits=args.bits))


def ort_kquant(args, model):
    need(args.bits == 4, "ONNX Runtime's k_quant has 4 bits only here: its configuration has no option for them")
    return ort_quantizer(args, model, lambda q: q.KQuantWeightOnlyQuantConfig())


def ort_gptq(args, model):
    need(args.bits == 4, "ONNX Runtime's GPTQ has 4 bits only: its configuration has no option for them")
    reader = Reader(calibration(args, model))
    return ort_quantizer(args, model, lambda q: q.GPTQWeightOnlyQuantConfig(reader, **args.options))


# onnxsim


def int4_only(args):
    need((args.bits, args.group) == (4, 32), "onnxsim's int4 has 4 bits and groups of 32 only: no option for others")


def sim_int4(args, model):
    import onnxsim

    int4_only(args)
    return onnxsim.quantize_weight_only_int4(model)


def sim_nbits(args, model):
    import onnxsim

    int4_only(args)
    return onnxsim.quantize_weight_only_matmul_nbits(model)


def sim_hqq(args, model):
    import onnxsim

    int4_only(args)
    return onnxsim.quantize_weight_only_int4_hqq(model)


def sim_refined(name):
    """A method that starts from the int4 model, and improves it with calibration data."""

    def run(args, model):
        import onnxsim

        return getattr(onnxsim, name)(model, sim_int4(args, model), calibration(args, model), **args.options)

    return run


# onnx-neural-compressor


def onc_quantizer(args, model, config):
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as q

    quantizer = q.MatMulNBitsQuantizer(
        model, args.group, is_symmetric=args.symmetric, algo_config=config(q), n_bits=args.bits
    )
    quantizer.process()
    return getattr(quantizer.model, "model", quantizer.model)


def onc_rtn(args, model):
    return onc_quantizer(args, model, lambda q: q.RTNWeightOnlyQuantConfig())


def onc_gptq(args, model):
    reader = Reader(calibration(args, model))
    return onc_quantizer(args, model, lambda q: q.GPTQWeightOnlyQuantConfig(reader, **args.options))


def onc_awq(args, model):
    reader = Reader(calibration(args, model))
    return onc_quantizer(args, model, lambda q: q.AWQWeightOnlyQuantConfig(reader, **args.options))


METHODS = {
    "ort-rtn": ort_rtn,
    "ort-hqq": ort_hqq,
    "ort-kquant": ort_kquant,
    "ort-gptq": ort_gptq,
    "onnxsim-int4": sim_int4,
    "onnxsim-nbits": sim_nbits,
    "onnxsim-hqq": sim_hqq,
    "onnxsim-awq": sim_refined("apply_awq"),
    "onnxsim-gptq": sim_refined("apply_gptq"),
    "onnxsim-gptaq": sim_refined("apply_gptaq"),
    "onnxsim-qronos": sim_refined("apply_qronos"),
    "onnxsim-autoround": sim_refined("apply_autoround"),
    "onc-rtn": onc_rtn,
    "onc-gptq": onc_gptq,
    "onc-awq": onc_awq,
}
MODULES = {"ort": "onnxruntime.quantization", "onnxsim": "onnxsim", "onc": "onnx_neural_compressor.quantization"}


def limit(threads):
    """Sessions of ONNX Runtime take this many threads, whoever makes them."""
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.intra_op_num_threads = threads

    onnxruntime.SessionOptions = Options


def need(condition, why):
    if not condition:
        raise SystemExit(why)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--calib")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    __import__(MODULES[args.method.split("-")[0]])
    limit(args.threads)
    logging.disable(logging.INFO)
    start = time.perf_counter()
    model = METHODS[args.method](args, onnx.load(args.input))
    onnx.save(model, args.output)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
