"""Lines of the attention's ONNX function: what each row of the tokens is, and which keys a query sees.

``onnx_functions.py`` puts them together with those of ``onnx_products.py``; a line names values of earlier ones.
"""

from __future__ import annotations

from hstu_trt.export.onnx_form import AttentionForm


def shape_lines() -> list[str]:
    """Users and the ends of each run of rows: all prefixes, then all candidates."""
    return [
        "zero = Constant <value_int: int = 0> ()",
        "one = Constant <value_int: int = 1> ()",
        "first = Constant <value_ints: ints = [0]> ()",
        "second = Constant <value_ints: ints = [1]> ()",
        "minus_one = Constant <value_ints: ints = [-1]> ()",
        "far = Constant <value_ints: ints = [9223372036854775807]> ()",
        "query_bounds = Cast <to: int = 7> (query_offsets)",
        "key_bounds = Cast <to: int = 7> (prefix_offsets)",
        "candidate_bounds = Cast <to: int = 7> (candidate_offsets)",
        "key_ends = Slice (key_bounds, second, far, first)",
        "key_begins = Slice (key_bounds, first, minus_one, first)",
        "prefix_lengths = Sub (key_ends, key_begins)",
        "query_ends = Slice (query_bounds, second, far, first)",
        "query_begins = Slice (query_bounds, first, minus_one, first)",
        "query_lengths = Sub (query_ends, query_begins)",
        "unqueried = Sub (prefix_lengths, query_lengths)",
        "users = Shape (prefix_lengths)",
        "user_count = Squeeze (users)",
    ]


def row_lines(side: str, source: str) -> list[str]:
    """For each query (or key) row: user, candidate or not, position in the user's prefix, and id for the mask.

    source: the tokens, whose rows are counted.
    """
    local = {
        # Queries are the last rows of a prefix, so their positions begin behind the rows that are not queried.
        "query": ["query_skip = Gather (unqueried, query_user)", "query_local = Add (query_in_run, query_skip)"],
        "key": ["key_local = Identity (key_in_run)"],
    }[side]
    lines = [
        "S_total = Gather (S_bounds, user_count)",
        "S_candidate_bounds = Add (candidate_bounds, S_total)",
        "S_candidate_ends = Slice (S_candidate_bounds, second, far, first)",
        "S_candidate_begins = Slice (S_candidate_bounds, first, minus_one, first)",
        "S_run_ends = Concat <axis: int = 0> (S_ends, S_candidate_ends)",
        "S_run_begins = Concat <axis: int = 0> (S_begins, S_candidate_begins)",
        f"S_row_count = Shape <start: int = 0, end: int = 1> ({source})",
        "S_row_limit = Squeeze (S_row_count)",
        "S_index = Range (zero, S_row_limit, one)",
        "S_index_column = Unsqueeze (S_index, second)",
        "S_is_past = GreaterOrEqual (S_index_column, S_run_ends)",
        "S_past = Cast <to: int = 7> (S_is_past)",
        "S_run = ReduceSum <keepdims: int = 0> (S_past, second)",
        "S_user = Mod (S_run, user_count)",
        "S_is_candidate = GreaterOrEqual (S_run, user_count)",
        "S_run_begin = Gather (S_run_begins, S_run)",
        "S_in_run = Sub (S_index, S_run_begin)",
        *local,
        "S_prefix_length = Gather (prefix_lengths, S_user)",
        "S_position = Where (S_is_candidate, S_prefix_length, S_local)",
    ]
    return [line.replace("S_", f"{side}_") for line in lines]


def mask_lines(form: AttentionForm) -> list[str]:
    """bool [Tq, Tk]: which keys a query sees. Pairs are compared in INT32, which halves the largest tensors."""
    return [
        *_mask_ids(form, "query"),
        *_mask_ids(form, "key"),
        "query_id_column = Unsqueeze (query_id, second)",
        "signed_distance = Sub (query_id_column, key_id)",
        "distance = Identity (signed_distance)" if form.causal else "distance = Abs (signed_distance)",
        "zero_id = Cast <to: int = 6> (zero)",
        "before = Greater (distance, zero_id)",
        # The key row of a query: its own place among the keys.
        "own_prefix_begin = Gather (key_begins, query_user)",
        "own_prefix_row = Add (own_prefix_begin, query_local)",
        "own_candidate_row_0 = Sub (query_index, query_total)",
        "own_candidate_row = Add (own_candidate_row_0, key_total)",
        "own_row = Where (query_is_candidate, own_candidate_row, own_prefix_row)",
        "own_row_id = Cast <to: int = 6> (own_row)",
        "own_row_column = Unsqueeze (own_row_id, second)",
        "key_index_id = Cast <to: int = 6> (key_index)",
        "itself = Equal (own_row_column, key_index_id)",
        *(_groups() if form.grouped else ["ordered = Or (before, itself)"]),
        *(_window(form) if form.window else ["windowed = Identity (ordered)"]),
        *(_contextual() if form.contextual else ["with_context = Identity (windowed)"]),
        "query_user_id = Cast <to: int = 6> (query_user)",
        "query_user_column = Unsqueeze (query_user_id, second)",
        "key_user_id = Cast <to: int = 6> (key_user)",
        "same_user = Equal (query_user_column, key_user_id)",
        "valid = And (with_context, same_user)",
    ]


def _mask_ids(form: AttentionForm, side: str) -> list[str]:
    """Ids count from the first non-contextual token (contextual tokens are 0); candidates stand at the end."""
    if not form.contextual:
        return [
            f"{side}_id = Cast <to: int = 6> ({side}_position)",
            f"{side}_end = Cast <to: int = 6> ({side}_prefix_length)",
        ]
    lines = [
        "S_contextual = Constant <value_int: int = @contextual_seq_len> ()",
        "S_contextual_but_one = Sub (S_contextual, one)",
        "S_wide_end = Sub (S_prefix_length, S_contextual_but_one)",
        "S_shifted = Sub (S_position, S_contextual_but_one)",
        "S_counted = Max (S_shifted, zero)",
        "S_raw_id = Where (S_is_candidate, S_wide_end, S_counted)",
        "S_wide_id = Min (S_raw_id, S_wide_end)",
        "S_id = Cast <to: int = 6> (S_wide_id)",
        "S_end = Cast <to: int = 6> (S_wide_end)",
    ]
    return [line.replace("S_", f"{side}_") for line in lines]


def _groups() -> list[str]:
    """Candidates see the earlier ones of their group. Prefix rows are in none: -1 for queries, -2 for keys."""
    numbers = [
        "S_group_of_run = Div (S_in_run, group_size)",
        "S_wide_group = Where (S_is_candidate, S_group_of_run, S_in_no_group)",
        "S_group = Cast <to: int = 6> (S_wide_group)",
        "S_in_run_id = Cast <to: int = 6> (S_in_run)",
    ]
    return [
        "group_size = Constant <value_int: int = @candidate_group_size> ()",
        "query_in_no_group = Constant <value_int: int = -1> ()",
        "key_in_no_group = Constant <value_int: int = -2> ()",
        *(line.replace("S_", f"{side}_") for side in ("query", "key") for line in numbers),
        "query_group_column = Unsqueeze (query_group, second)",
        "same_group = Equal (query_group_column, key_group)",
        "query_in_run_column = Unsqueeze (query_in_run_id, second)",
        "earlier_in_run = Greater (query_in_run_column, key_in_run_id)",
        "earlier_in_group = And (same_group, earlier_in_run)",
        "before_or_grouped = Or (before, earlier_in_group)",
        "ordered = Or (before_or_grouped, itself)",
    ]


def _window(form: AttentionForm) -> list[str]:
    near = [
        "wide_window = Constant <value_int: int = @max_attn_len> ()",
        "window = Cast <to: int = 6> (wide_window)",
        "near_by_distance = LessOrEqual (distance, window)",
    ]
    tail = [
        "wide_tail_length = Constant <value_int: int = @min_full_attn_seq_len> ()",
        "tail_length = Cast <to: int = 6> (wide_tail_length)",
        "tail_begin = Sub (query_end, tail_length)",
        "in_tail = GreaterOrEqual (query_id, tail_begin)",
        "in_tail_column = Unsqueeze (in_tail, second)",
        "near = Or (near_by_distance, in_tail_column)",
    ]
    rest = tail if form.full_tail else ["near = Identity (near_by_distance)"]
    return [*near, *rest, "windowed = And (ordered, near)"]


def _contextual() -> list[str]:
    return [
        "query_in_context = Equal (query_id_column, zero_id)",
        "key_in_prefix = Less (key_id, key_end)",
        "context_pair = And (query_in_context, key_in_prefix)",
        "with_context = Or (windowed, context_pair)",
    ]
