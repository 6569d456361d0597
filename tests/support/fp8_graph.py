"""A small fp8 graph in the form that export writes: Q/DQ around a product, e4m3 tokens and scales into the op."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, DIM = 2, 32
WIDTH = HEADS * DIM
BODY = """
<domain: "hstu.trt", opset_import: ["" : 20]>
HstuAttention <alpha, causal, output_type, plugin_version, plugin_namespace>
  (q, k, v, query_offsets, prefix_offsets, candidate_offsets, norm, q_scale, k_scale, v_scale) => (out)
{
  real_q = DequantizeLinear (q, q_scale)
  real_k = DequantizeLinear (k, k_scale)
  real_v = DequantizeLinear (v, v_scale)
  q_by_head = Transpose <perm: ints = [1, 0, 2]> (real_q)
  k_by_head = Transpose <perm: ints = [1, 2, 0]> (real_k)
  v_by_head = Transpose <perm: ints = [1, 0, 2]> (real_v)
  scores = MatMul (q_by_head, k_by_head)
  gate = Sigmoid (scores)
  silu = Mul (scores, gate)
  weighted = MatMul (silu, v_by_head)
  by_token = Transpose <perm: ints = [1, 0, 2]> (weighted)
  wide = Div (by_token, norm)
  out = Cast <to: int = @output_type> (wide)
}
"""
PLUGIN = {"plugin_version": "1", "plugin_namespace": "hstu.trt"}


def fp8_graph(layers: int = 2) -> onnx.ModelProto:
    """Attention layers over tokens: fp16 [tokens, 64] -> fp16 [tokens, 64]."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(np.float16(0.01), "scale16"),
        numpy_helper.from_array(np.full(1, 0.01, np.float32), "scale32"),
        helper.make_tensor("zero8", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        numpy_helper.from_array(np.asarray([-1, HEADS, DIM]), "by_head"),
        numpy_helper.from_array(np.asarray([-1, WIDTH]), "flat"),
    ]
    nodes, x = [], "x"
    for layer in range(layers):
        weight = rng.normal(0, 0.1, (WIDTH, 3 * WIDTH)).astype(np.float16)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes += _layer(layer, x)
        x = f"out{layer}"
    users = ["query_offsets", "prefix_offsets", "candidate_offsets"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["uih_tokens", WIDTH])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, ["users_plus_1"]) for name in users]
    inputs += [helper.make_tensor_value_info("norm", TensorProto.FLOAT, [1])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT16, ["uih_tokens", WIDTH])]
    return helper.make_model(
        helper.make_graph(nodes, "fp8", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("hstu.trt", 1)],
        functions=[onnx.parser.parse_function(BODY)],
        ir_version=10,
    )


def _layer(n: int, x: str) -> list[onnx.NodeProto]:
    made = []
    for name, source in ((f"x{n}", x), (f"w{n}", f"w{n}")):
        made.append(helper.make_node("QuantizeLinear", [source, "scale16", "zero8"], [f"{name}_8"]))
        made.append(helper.make_node("DequantizeLinear", [f"{name}_8", "scale16", "zero8"], [f"{name}_16"]))
    made.append(helper.make_node("MatMul", [f"x{n}_16", f"w{n}_16"], [f"qkv{n}"]))
    made.append(helper.make_node("Split", [f"qkv{n}"], [f"{part}{n}" for part in "qkv"], axis=1, num_outputs=3))
    for part in "qkv":
        made.append(helper.make_node("Reshape", [f"{part}{n}", "by_head"], [f"{part}{n}_h"]))
        made.append(helper.make_node("QuantizeLinear", [f"{part}{n}_h", "scale16", "zero8"], [f"{part}{n}_8"]))
    tokens = [f"{part}{n}_8" for part in "qkv"]
    rest = ["query_offsets", "prefix_offsets", "candidate_offsets", "norm", "scale32", "scale32", "scale32"]
    attributes = {"alpha": 1.0, "causal": 0, "output_type": int(TensorProto.FLOAT16), **PLUGIN}
    made.append(helper.make_node("HstuAttention", tokens + rest, [f"a{n}"], domain="hstu.trt", **attributes))
    made.append(helper.make_node("Reshape", [f"a{n}", "flat"], [f"out{n}"]))
    return made
