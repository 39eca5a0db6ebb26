"""A compiled model in this process."""

import ctypes
import json

import numpy as np


class Library:
    """A compiled model, called as its header says, on one thread."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        start = ctypes.addressof(ctypes.c_char.in_dll(self.library, "qcc_model"))
        self.about = json.loads(ctypes.string_at(start))
        weights = path.with_suffix(".weights").read_bytes()
        self.weights, self.arena = self.aligned(len(weights)), self.aligned(self.about["arena"])
        self.weights[:] = np.frombuffer(weights, np.uint8)

    @staticmethod
    def aligned(size):
        room = np.empty(size + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + size]

    def prepared(self, feed):
        """A call that runs it on these inputs, and gives what `qcc_run` returned; and the outputs by name, which it writes."""
        about, types = self.about, {"f32": np.float32, "i64": np.int64, "bool": np.bool_, "i32": np.int32}
        sizes = {}
        for port in about["inputs"]:
            sizes |= {d: n for d, n in zip(port["shape"], feed[port["name"]].shape) if isinstance(d, str)}

        def size(dim):
            if isinstance(dim, list):
                return sum(factor * int(np.prod([sizes[n] for n in names])) for factor, names in dim)
            return sizes[dim] if isinstance(dim, str) else dim

        given = [np.ascontiguousarray(feed[p["name"]], types[p["elem"]]) for p in about["inputs"]]
        made = [np.empty([size(d) for d in p["shape"]], types[p["elem"]]) for p in about["outputs"]]
        table = lambda arrays: (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
        dims = (ctypes.c_int64 * len(about["dims"]))(*[sizes[name] for name, _ in about["dims"]])
        pointer = lambda a: ctypes.c_void_p(a.ctypes.data)
        run, outputs = self.library.qcc_run, {p["name"]: array for p, array in zip(about["outputs"], made)}
        arguments = [dims, table(given), table(made), pointer(self.arena), pointer(self.weights), None, None]
        # What the tables point to lives as long as the call.
        return lambda keep=given: run(*arguments), outputs

    def run(self, feed):
        """The outputs by name, and what `qcc_run` returned."""
        call, outputs = self.prepared(feed)
        code = call()
        return outputs, code
