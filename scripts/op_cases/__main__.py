#!/usr/bin/env python3
"""Writes dialects/testdata/*.cases: single ops with random inputs, and what ONNX Runtime or numpy says of them.

Usage: python3 scripts/op_cases [FAMILY..]     needs onnx, onnxruntime and numpy
"""
import pathlib
import sys

import dense
import microsoft
import spatial
from harness import lines, restart

OUT = pathlib.Path(__file__).resolve().parent.parent.parent / "dialects" / "testdata"

if __name__ == "__main__":
    for family in [*dense.FAMILIES, *spatial.FAMILIES, *microsoft.FAMILIES]:
        if len(sys.argv) > 1 and family.__name__ not in sys.argv[1:]:
            continue
        restart()
        family()
        path = OUT / f"{family.__name__}.cases"
        path.write_text("\n".join(lines) + "\n")
        print(path.name, sum(line.startswith("case ") for line in lines), "cases,", path.stat().st_size, "bytes")
