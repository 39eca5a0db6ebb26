"""Attention of ONNX Runtime on one thread at the sizes of `cargo bench --bench attention`: microseconds of a call."""

import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto as T, helper as h

SIZES = [
    (6, 64, 128, 128, 0),
    (6, 64, 128, 128, 1),
    (6, 64, 512, 512, 0),
    (6, 64, 512, 512, 1),
    (6, 64, 1, 512, 0),
    (32, 64, 128, 128, 0),
    (32, 64, 128, 128, 1),
    (32, 64, 1, 1024, 0),
]
"""Heads, their size, query positions, keys, and whether the frontier is causal."""

TURNS = 200


def main():
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for heads, size, rows, keys, causal in SIZES:
        ports = [("q", [1, rows, heads * size])]
        ports += [(name, [1, keys, heads * size] if rows > 1 else [1, heads, keys, size]) for name in "kv"]
        values = [h.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in ports]
        out = h.make_tensor_value_info("y", T.FLOAT, [1, rows, heads * size])
        node = h.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=heads, unidirectional=causal
        )
        opsets = [h.make_opsetid("", 17), h.make_opsetid("com.microsoft", 1)]
        model = h.make_model(h.make_graph([node], "g", values, [out]), opset_imports=opsets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        binding = session.io_binding()
        for name, shape in ports:
            binding.bind_cpu_input(name, rng.standard_normal(shape).astype(np.float32))
        binding.bind_output("y")
        times = []
        for _ in range(TURNS):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            times.append(time.perf_counter() - start)
        print(f"{heads} {size} {rows} {keys}{' causal' if causal else ''}: {min(times) * 1e6:.1f}")


if __name__ == "__main__":
    main()
