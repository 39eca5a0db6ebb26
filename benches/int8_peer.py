#!/usr/bin/env python3
"""Static INT8 by ONNX Runtime's own quantizer, as its documentation has it done.

    int8_peer.py MODEL OUT --calib inputs.npz --method MinMax|Percentile|Entropy [--reduce-range] [--ops MatMul Conv ..]

The model is pre-processed (shapes, graph optimization), then quantized with weights per channel in int8, activations in
uint8, as QDQ. Calibration data is fed one sample at a time. Without OUT being named (`-`) it only calibrates.
"""
import argparse
import logging
import pathlib
import tempfile

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    def __init__(self, inputs):
        count = len(next(iter(inputs.values())))
        self.samples = iter([{k: v[i : i + 1] for k, v in inputs.items()} for i in range(count)])

    def get_next(self):
        return next(self.samples, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--method", required=True, choices=[m.name for m in CalibrationMethod])
    parser.add_argument("--reduce-range", action="store_true")
    parser.add_argument("--ops", nargs="*", help="op types to quantize; all that it knows by default")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    inputs, method = dict(np.load(args.calib)), CalibrationMethod[args.method]
    with tempfile.TemporaryDirectory() as folder:
        ready = str(pathlib.Path(folder) / "ready.onnx")
        # Symbolic inference fails on some exports; that of the graph's own types serves as well here.
        quant_pre_process(args.model, ready, skip_symbolic_shape=True)
        if args.out == "-":
            augmented = str(pathlib.Path(folder) / "augmented.onnx")
            calibrator = create_calibrator(ready, args.ops, augmented, method)
            calibrator.collect_data(Reader(inputs))
            calibrator.compute_data()
            return
        quantize_static(
            ready,
            args.out,
            Reader(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=args.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            op_types_to_quantize=args.ops,
        )


if __name__ == "__main__":
    main()
