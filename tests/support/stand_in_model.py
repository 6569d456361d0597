"""A model folder of stand-ins: small ONNX graphs with the contract's names, where users must not see each other."""

import dataclasses

import numpy as np
import onnx
import onnx.parser

from hstu_trt.contract.model_folder import read_model_folder, write_model_folder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.contract.tensors import Limits

HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
CONSTANTS = """
  zero = Constant<value = int64 {0}> ()
  one = Constant<value = int64 {1}> ()
  axis0 = Constant<value = int64[1] {0}> ()
  axis1 = Constant<value = int64[1] {1}> ()
  four = Constant<value = int64[1] {4}> ()
  far = Constant<value = int64[1] {1000000}> ()
"""
# Which user a token belongs to: how many users end at or before it.
USERS = """
  {g}_n = Shape ({g}_timestamps)
  {g}_n0 = Squeeze ({g}_n)
  {g}_range = Range (zero, {g}_n0, one)
  {g}_column = Unsqueeze ({g}_range, axis1)
  {g}_wide = Cast<to = 7> ({g}_offsets)
  {g}_ends = Slice ({g}_wide, axis1, far, axis0)
  {g}_passed = GreaterOrEqual ({g}_column, {g}_ends)
  {g}_count = Cast<to = 7> ({g}_passed)
  {g}_user = ReduceSum<keepdims = 0> ({g}_count, axis1)
"""
# Per candidate: the sum over its user's history, by the user's norm.
MIX = """
  candidate_rows = Unsqueeze (candidate_user, axis1)
  together = Equal (candidate_rows, uih_user)
  mask = Cast<to = 1> (together)
  history_sum = MatMul (mask, uih_value)
  user_shape = Shape (uih_ends)
  norms_of_users = Expand (attention_norm, user_shape)
  norm_flat = Gather (norms_of_users, candidate_user)
  norm = Unsqueeze (norm_flat, axis1)
  mean = Div (history_sum, norm)
  contextual_value = Gather (contextual, candidate_user)
  with_contextual = Add (mean, contextual_value)
"""
PAYLOAD = """
  int64[uih_tokens] uih_timestamps, int64[uih_tokens] uih_actions, int64[candidates] candidate_timestamps,
  int32[users_plus_1] uih_offsets, int32[users_plus_1] candidate_offsets, float[norms] attention_norm
"""
HSTU_BODY = (
    CONSTANTS
    + USERS.format(g="uih")
    + USERS.format(g="candidate")
    + """
  seconds = Add (uih_timestamps, uih_actions)
  seconds_column = Unsqueeze (seconds, axis1)
  seconds_float = Cast<to = 1> (seconds_column)
  uih_left = Slice (uih_embeddings, axis0, four, axis1)
  uih_value = Add (uih_left, seconds_float)
  contextual = Identity (contextual_embeddings)
"""
    + MIX
    + """
  candidate_left = Slice (candidate_embeddings, axis0, four, axis1)
  candidate_seconds = Cast<to = 1> (candidate_timestamps)
  candidate_seconds_column = Unsqueeze (candidate_seconds, axis1)
  candidate_value = Add (candidate_left, candidate_seconds_column)
  user_embeddings = Add (with_contextual, candidate_value)
"""
)
# Rows in the split layout: contextual and history rows sorted by user, then all candidates.
TAP = """
  two = Constant<value = int64 {2}> ()
  user_range_end = Squeeze (user_shape)
  user_range = Range (zero, user_range_end, one)
  contextual_key = Mul (user_range, two)
  history_key_even = Mul (uih_user, two)
  history_key = Add (history_key_even, one)
  keys = Concat<axis = 0> (contextual_key, history_key)
  rows = Concat<axis = 0> (contextual_embeddings, uih_value)
  count = Shape (keys)
  count0 = Squeeze (count)
  place = Range (zero, count0, one)
  scaled = Mul (keys, far)
  sort_keys = Add (scaled, place)
  sorted, order = TopK<largest = 0> (sort_keys, count)
  prefixes = Gather (rows, order)
  tap = Concat<axis = 0> (prefixes, user_embeddings)
"""
HSTU_INPUTS = f"""
  float[uih_tokens, 8] uih_embeddings, float[candidates, 8] candidate_embeddings, float[users, 4] contextual_embeddings,
  {PAYLOAD}"""
FUSED_BODY = (
    CONSTANTS
    + USERS.format(g="uih")
    + USERS.format(g="candidate")
    + """
  pairs = Constant<value = int64[2] {-1, 2}> ()
  uih_pairs = Reshape<allowzero = 0> (uih_ids, pairs)
  uih_sum = ReduceSum<keepdims = 1> (uih_pairs, axis1)
  uih_value = Cast<to = 1> (uih_sum)
  contextual = Cast<to = 1> (contextual_ids)
"""
    + MIX
    + """
  candidate_pairs = Reshape (candidate_ids, pairs)
  candidate_sum = ReduceSum<keepdims = 1> (candidate_pairs, axis1)
  candidate_value = Cast<to = 1> (candidate_sum)
  preds = Add (with_contextual, candidate_value)
"""
)
GRAPHS = {
    "hstu": f"hstu ({HSTU_INPUTS}) => (float[candidates, 4] user_embeddings) {{ {HSTU_BODY} }}",
    "hstu_taps": (
        f"taps ({HSTU_INPUTS}) => (float[candidates, 4] user_embeddings, float[tokens, 4] tap) {{ {HSTU_BODY} {TAP} }}"
    ),
    "mlp_head": """head (float[candidates, 4] user_embeddings, float[candidates, 8] candidate_embeddings)
      => (float[candidates, 1] preds) {
      axis1 = Constant<value = int64[1] {1}> ()
      a = ReduceSum<keepdims = 1> (user_embeddings, axis1)
      b = ReduceSum<keepdims = 1> (candidate_embeddings, axis1)
      preds = Add (a, b) }""",
    "ranking_fused": f"""fused (int64[uih_ids_n] uih_ids, int64[candidate_ids_n] candidate_ids,
      int64[users, 1] contextual_ids, {PAYLOAD}) => (float[candidates, 1] preds) {{ {FUSED_BODY} }}""",
    "embedding_lookup": """lookup (int64[uih_tokens, 2] uih_ids, int64[candidates, 2] candidate_ids,
      int64[users, 1] contextual_ids) => (float[uih_tokens, 8] uih_embeddings,
      float[candidates, 8] candidate_embeddings, float[users, 4] contextual_embeddings) {
      eight = Constant<value = int64[2] {-1, 8}> ()
      four = Constant<value = int64[2] {-1, 4}> ()
      u = Gather (table, uih_ids)
      uih_embeddings = Reshape (u, eight)
      c = Gather (table, candidate_ids)
      candidate_embeddings = Reshape (c, eight)
      x = Gather (table, contextual_ids)
      contextual_embeddings = Reshape (x, four) }""",
}


def table_rows():
    return np.arange(40, dtype=np.float32).reshape(10, 4)


def save_graph(folder, stage, text):
    graph = onnx.parser.parse_model(HEAD + text)
    if stage == "embedding_lookup":
        tensor = onnx.TensorProto(name="table", data_type=1, dims=[10, 4], data_location=1)
        for key, value in (("location", "tables/item_id/00000.safetensors"), ("offset", "4096"), ("length", "160")):
            tensor.external_data.add(key=key, value=value)
        graph.graph.initializer.append(tensor)
    for named in (*graph.graph.output, *graph.graph.node):
        if isinstance(named, onnx.ValueInfoProto) and named.name == "tap":
            named.name = "stu.0.out"
        if isinstance(named, onnx.NodeProto):
            named.output[:] = ["stu.0.out" if name == "tap" else name for name in named.output]
    (folder / f"{stage}.onnx").write_bytes(graph.SerializeToString())


def stand_in_config():
    config = debug()
    tables = tuple(dataclasses.replace(table, rows=10, dim=4, dtype="float32") for table in config.tables)
    return dataclasses.replace(config, layers=1, embedding_dim=4, model_dim=4, tables=tables)


def write_stand_in(folder, graphs=None, config=None):
    config = config or stand_in_config()
    folder.mkdir(parents=True)
    stored = [write_table(folder / "tables", table, [table_rows()]) for table in config.tables]
    write_tables_manifest(folder / "tables", stored, "test", {})
    for stage, text in {**GRAPHS, **(graphs or {})}.items():
        save_graph(folder, stage, text)
    limits = Limits(users=8, history=16, candidates=8, batch_history=64, batch_candidates=32)
    write_model_folder(
        folder, name="stand-in", config=config, limits=limits, precision="fp32", made_by="test", facts={}
    )
    return read_model_folder(folder)


def make_feed(spec, history, candidates, norms=1, seed=0):
    """A random feed of a stage for users with these lengths."""
    rng = np.random.default_rng(seed)
    sizes = {
        "users": len(history),
        "users_plus_1": len(history) + 1,
        "uih_tokens": sum(history),
        "candidates": sum(candidates),
        "norms": norms,
    }
    feed = {}
    for tensor in spec.inputs:
        shape = []
        for dim in tensor.dims:
            name, _, factor = (dim.name if not isinstance(dim, int) else str(dim)).partition("_x_")
            shape.append(dim if isinstance(dim, int) else sizes[name] * int(factor or 1))
        if tensor.dtype.startswith("float"):
            feed[tensor.name] = rng.uniform(1, 2, shape).astype(tensor.dtype)
        else:
            feed[tensor.name] = rng.integers(0, 10, shape).astype(tensor.dtype)
    for group, lengths in (("uih", history), ("candidate", candidates)):
        if f"{group}_offsets" in feed:
            feed[f"{group}_offsets"] = np.cumsum([0, *lengths]).astype(np.int32)
    return feed
