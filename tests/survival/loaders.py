"""What serving code does with a model's files: an ONNX session, a safetensors reader and a GGUF reader.

    loaders.py onnx DIRECTORY           run the encoder of model.onnx, whose weights are those of model.safetensors
    loaders.py safetensors DIRECTORY    every tensor
    loaders.py gguf DIRECTORY           every field and every tensor of model.gguf, as floats

Prints the sha256 of what came out. `write_encoder` makes model.onnx: the graph alone, pointing into model.safetensors;
`write_gguf` makes model.gguf of the same weights.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HEADS, WIDTH = 6, 12, 384
WEIGHTS = "model.safetensors"
GGUF = "model.gguf"
_TOKENS = [101, 7592, 1010, 2088, 999, 2129, 2024, 2017, 102]  # "hello, world! how are you" for BERT's tokenizer


def write_encoder(directory: Path) -> None:
    """`model.onnx` for the BERT encoder in `directory / model.safetensors`.

    Source: the safetensors format's header; onnx.proto, TensorProto.external_data; Devlin et al., 2019, section 3.
    """
    import onnx
    from onnx import TensorProto, helper

    with open(directory / WEIGHTS, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    initializers: list[Any] = []
    nodes: list[Any] = []

    def weight(name: str) -> str:
        begin, end = header[name]["data_offsets"]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=header[name]["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", 8 + length + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        return name

    def constant(name: str, values: list[int] | float) -> str:
        kind = TensorProto.INT64 if isinstance(values, list) else TensorProto.FLOAT
        shape = [len(values)] if isinstance(values, list) else []
        initializers.append(helper.make_tensor(name, kind, shape, values if isinstance(values, list) else [values]))
        return name

    def node(operation: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operation, list(inputs), [f"n{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def dense(at: str, x: str) -> str:
        transposed = node("Transpose", weight(f"{at}.weight"), perm=[1, 0])
        return node("Add", node("MatMul", x, transposed), weight(f"{at}.bias"))

    def normal(at: str, x: str) -> str:
        return node("LayerNormalization", x, weight(f"{at}.weight"), weight(f"{at}.bias"), axis=-1, epsilon=1e-12)

    split, merge = constant("split", [0, 0, HEADS, WIDTH // HEADS]), constant("merge", [0, 0, WIDTH])
    scale = constant("scale", (WIDTH // HEADS) ** -0.5)
    x = node("Gather", weight("embeddings.word_embeddings.weight"), "tokens")
    x = node("Add", x, node("Gather", weight("embeddings.position_embeddings.weight"), "positions"))
    x = node("Add", x, node("Gather", weight("embeddings.token_type_embeddings.weight"), "types"))
    x = normal("embeddings.LayerNorm", x)
    for number in range(LAYERS):
        at = f"encoder.layer.{number}"
        heads = {
            name: node(
                "Transpose",
                node("Reshape", dense(f"{at}.attention.self.{name}", x), split),
                perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3],
            )
            for name in ("query", "key", "value")
        }
        scores = node("Softmax", node("Mul", node("MatMul", heads["query"], heads["key"]), scale), axis=-1)
        seen = node("Transpose", node("MatMul", scores, heads["value"]), perm=[0, 2, 1, 3])
        seen = dense(f"{at}.attention.output.dense", node("Reshape", seen, merge))
        x = normal(f"{at}.attention.output.LayerNorm", node("Add", seen, x))
        wide = node("Gelu", dense(f"{at}.intermediate.dense", x))
        x = normal(f"{at}.output.LayerNorm", node("Add", dense(f"{at}.output.dense", wide), x))
    nodes.append(helper.make_node("Identity", [x], ["encoded"]))
    shape = ["batch", "length"]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("tokens", "positions", "types")],
        [helper.make_tensor_value_info("encoded", TensorProto.FLOAT, [*shape, WIDTH])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(directory / "model.onnx"))


def write_gguf(directory: Path) -> None:
    """`model.gguf` of the weights in `directory / model.safetensors`, stored as converters do it: the word embeddings in
    blocks of 8 bits, the other matrices in 16, vectors in 32.

    Source: gguf-py, GGUFWriter; the GGUF format's keys of the BERT architecture.
    """
    import gguf
    from safetensors import safe_open

    writer = gguf.GGUFWriter(directory / GGUF, "bert")
    writer.add_name("encoder")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    with safe_open(directory / WEIGHTS, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            values = tensors.get_tensor(name)
            if name == "embeddings.word_embeddings.weight":
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            elif values.dtype == np.float32:
                writer.add_tensor(name, values.astype(np.float16) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_onnx(directory: Path) -> bytes:
    """What the encoder says about one sentence."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokens = np.array([_TOKENS], dtype=np.int64)
    positions = np.arange(len(_TOKENS), dtype=np.int64)[None]
    (encoded,) = session.run(None, {"tokens": tokens, "positions": positions, "types": np.zeros_like(tokens)})
    assert encoded.shape == (1, len(_TOKENS), WIDTH)
    assert np.isfinite(encoded).all()
    assert encoded.std() > 0.01
    return bytes(encoded.tobytes())


def read_safetensors(directory: Path) -> bytes:
    """The digest of every tensor, by name."""
    from safetensors import safe_open

    total = hashlib.sha256()
    with safe_open(directory / WEIGHTS, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            total.update(name.encode() + tensors.get_tensor(name).tobytes())
    return total.digest()


def read_gguf(directory: Path) -> bytes:
    """The digest of the fields' contents, and of every tensor, by name."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(directory / GGUF)
    assert len(reader.tensors) > LAYERS
    total = hashlib.sha256()
    for name, field in reader.fields.items():
        total.update(f"{name}={field.contents()}".encode())
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        total.update(f"{tensor.name} {tensor.tensor_type.name} {values.shape}".encode() + values.tobytes())
    return total.digest()


if __name__ == "__main__":
    loader = {"onnx": run_onnx, "safetensors": read_safetensors, "gguf": read_gguf}[sys.argv[1]]
    print(hashlib.sha256(loader(Path(sys.argv[2]))).hexdigest())
