"""Micro-batches by token count, their buckets, and what the writer lays out in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cuda_models import fused_feed
from golden_cases import load_case
from hypothesis import given
from hypothesis import strategies as st

from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import PADDING_ID
from hstu_trt.engines.cuda.packing import Bucket, Size, bucket_of, pack, rounded_rows
from hstu_trt.engines.cuda.staging import StagingLayout, Writer, size_of

SIZES = st.lists(st.builds(Size, st.integers(0, 9000), st.integers(0, 2048)), max_size=40)


@given(SIZES, st.integers(1, 50_000), st.integers(1, 10))
def test_pack_keeps_order_and_limits(sizes: list[Size], max_tokens: int, max_users: int) -> None:
    runs = list(pack(sizes, max_tokens=max_tokens, max_users=max_users))
    assert [n for run in runs for n in run] == list(range(len(sizes)))
    for run in runs:
        tokens = [sizes[n].tokens for n in run]
        assert 1 <= len(run) <= max_users and (sum(tokens) <= max_tokens or len(run) == 1)
    for run, following in itertools.pairwise(runs):
        full = len(run) == max_users
        assert full or sum(sizes[n].tokens for n in run) + sizes[following[0]].tokens > max_tokens


@given(st.lists(st.builds(Size, st.integers(0, 9000), st.integers(0, 2048)), min_size=1, max_size=70))
def test_a_bucket_has_room_for_users_and_the_filler(sizes: list[Size]) -> None:
    bucket = bucket_of(sizes)
    assert bucket.users > len(sizes)
    for have, needed in (
        (bucket.prefix, [s.prefix for s in sizes]),
        (bucket.candidates, [s.candidates for s in sizes]),
    ):
        assert sum(needed) <= have and have % 128 == 0 and have > 0


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 128), (1, 128), (128, 128), (129, 256), (8192, 8192), (8193, 8320), (36_864, 36_864)]
)
def test_rounded_rows(rows: int, expected: int) -> None:
    assert rounded_rows(rows) == expected


@given(st.integers(8192, 1 << 20))
def test_little_is_wasted_on_large_batches(rows: int) -> None:
    assert rows <= rounded_rows(rows) <= rows * (1 + 1 / 64) + 128


@pytest.mark.parametrize("name", ["caseA", "caseB"])
def test_every_element_is_written(name: str) -> None:
    """A buffer full of rubbish holds the same as a buffer of other rubbish, but for what no kernel reads."""
    case = load_case(name)
    users = list(one_user_feeds(fused_feed(case.request)))[:3]
    bucket = bucket_of([size_of(case.config, user) for user in users])
    layout = StagingLayout(case.config, bucket)
    written = []
    for rubbish in (0, 255):
        buffer = torch.full((layout.bytes,), rubbish, dtype=torch.uint8)
        Writer(case.config).write(layout.arrays(buffer), bucket, users)
        written.append(layout.arrays(buffer))
    prefixes = written[0]["prefix_offsets"]
    contextual = np.concatenate([start + np.arange(len(case.config.contextual_slots)) for start in prefixes[:3]])
    read = np.ones(bucket.tokens, dtype=bool)
    read[contextual] = False
    read[bucket.prefix : bucket.prefix + written[0]["candidate_offsets"][3]] = False
    for key, array in written[0].items():
        same = array == written[1][key]
        assert same[..., read].all() if key == "actions" else same.all(), key


def test_the_filler_owns_what_is_left() -> None:
    case = load_case("caseB")
    users = list(one_user_feeds(fused_feed(case.request)))[:2]
    bucket = Bucket(256, 128, 8)
    layout = StagingLayout(case.config, bucket)
    buffer = torch.zeros(layout.bytes, dtype=torch.uint8)
    Writer(case.config).write(layout.arrays(buffer), bucket, users)
    inputs = layout.inputs(buffer)
    prefix = sum(size_of(case.config, user).prefix for user in users)
    candidates = sum(size_of(case.config, user).candidates for user in users)
    assert inputs.prefix_offsets.tolist()[2:] == [prefix] * 6 + [256]
    assert inputs.candidate_offsets.tolist()[2:] == [candidates] * 6 + [128]
    assert (inputs.token_ids[:, prefix:256] == PADDING_ID).all() and (inputs.timestamps[prefix:256] == 0).all()
    assert (inputs.contextual_ids[:, 2:] == PADDING_ID).all() and (inputs.norm > 0).all()
    assert inputs.prefix_tokens == 256
