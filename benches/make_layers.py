#!/usr/bin/env python3
"""Writes a decoder of many equal layers in the form of a legacy exporter, as qcc's text: sizes computed again for every
Reshape and Expand, 118 nodes a layer. The layer is the template that the tests use.

    make_layers.py layers.qir [--layers 84]
"""
import argparse
import pathlib

TEMPLATE = pathlib.Path(__file__).resolve().parent.parent / "testdata/layers.qir.template"


def build(layers):
    head, rest = TEMPLATE.read_text().split("layer\n", 1)
    layer, tail = rest.split("tail\n", 1)
    body = "".join(layer.replace("{i}", str(i)).replace("{j}", str(i + 1)) for i in range(layers))
    return head.removeprefix("head\n") + body + tail.replace("{n}", str(layers))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=84)
    args = parser.parse_args()
    args.output.write_text(build(args.layers))


if __name__ == "__main__":
    main()
