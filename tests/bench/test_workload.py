"""Workloads: generated deterministically, saved, refused when damaged, and turned into a model's features."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.bench.workloads.generate import generate, generate_slots
from hstu_trt.bench.workloads.lengths import ConstLengths, StreamLengths
from hstu_trt.bench.workloads.profiles import PROFILES, Profile
from hstu_trt.bench.workloads.workload import Workload, concatenate
from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.features import check_request, pack_request
from hstu_trt.contract.model import ContextualFeature, HstuConfig, TableConfig
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import Limits, stage_specs

FIELDS = [field.name for field in dataclasses.fields(Workload)]
LIMITS = Limits(users=32, history=256, candidates=64, batch_history=8192, batch_candidates=2048)
STREAM = Profile(
    name="stream",
    lengths=StreamLengths(train_slots=3, infer_slots=4, chunk_mean=9.0, chunk_sd=2.0, chunk_min=5),
    candidates=(3, 5),
    zipf=0.0,
    users=12,
    requests=1000,
)


def small_tables() -> HstuConfig:
    """As many items, categories and users as the checkpoint of the tests has."""
    rows = {"item_id": 400, "item_category_id": 23, "user_id": 50}
    config = debug()
    tables = tuple(dataclasses.replace(table, rows=rows[table.name]) for table in config.tables)
    return dataclasses.replace(config, tables=tables)


def several_features() -> HstuConfig:
    """Two contextual features, one with three slots, and action masks that are no powers of two."""
    base = debug()
    slots = (ContextualFeature(name="user_id", slots=1), ContextualFeature(name="place", slots=3))
    place = TableConfig(name="place", rows=7, dim=64, dtype="float16", features=("place",))
    return dataclasses.replace(
        base,
        contextual_features=slots,
        tables=(*base.tables, place),
        user_embedding_features=(*base.user_embedding_features, "place"),
        action_weights=(3, 64, 256),
    )


@pytest.fixture(scope="module")
def ci() -> Workload:
    return generate(PROFILES["ci"](), small_tables())


@pytest.mark.parametrize("profile", [PROFILES["ci"](), STREAM], ids=lambda p: p.name)
def test_same_seed_same_bytes(tmp_path: Path, profile: Profile) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        generate(profile, small_tables(), seed=seed).save(tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_ci_profile_covers_every_edge(ci: Workload) -> None:
    assert len(ci) == 256
    assert {0, 1, 31, 32, 33, 255, 256} <= set(ci.history_lengths.tolist())
    assert (ci.candidate_counts == 32).all()
    assert ci.uih_item.max() < 400 and ci.user_id.max() < 50
    assert len(np.unique(ci.user_id)) == 50


def test_history_is_sorted_and_older_than_the_query(ci: Workload) -> None:
    for row in range(len(ci)):
        times = ci.uih_ts[ci.uih_off[row] : ci.uih_off[row + 1]]
        assert (np.diff(times) > 0).all()
        assert not times.size or (times[0] > 0 and times[-1] < ci.query_time[row])
    assert len(np.unique(ci.query_time)) > 200


def test_times_may_be_ones_and_nothing_else_changes(ci: Workload) -> None:
    ones = generate(PROFILES["ci"](), small_tables(), timestamps="ones")
    assert (ones.uih_ts == 1).all() and (ones.query_time == 1).all()
    for name in set(FIELDS) - {"uih_ts", "query_time"}:
        assert np.array_equal(getattr(ones, name), getattr(ci, name))


def test_limits_cut_histories_and_candidates() -> None:
    limits = Limits(users=1, history=5, candidates=4, batch_history=5, batch_candidates=4)
    cut = generate(PROFILES["ci"](), small_tables(), limits=limits)
    assert cut.history_lengths.max() == 5 and (cut.candidate_counts == 4).all()


def test_stream_users_keep_their_past() -> None:
    workload = generate(STREAM, debug())
    assert (np.diff(workload.key[:, 0]) >= 0).all()
    assert set(workload.candidate_counts.tolist()) == {3, 5}
    seen: dict[int, tuple[np.ndarray, int]] = {}
    for row in range(len(workload)):
        user, span = int(workload.user_id[row]), slice(workload.uih_off[row], workload.uih_off[row + 1])
        events = np.stack([workload.uih_item[span], workload.uih_ts[span], workload.uih_weight[span]])
        before, asked = seen.get(user, (events[:, :0], 0))
        assert np.array_equal(events[:, : before.shape[1]], before)
        assert workload.query_time[row] > max(asked, events[1].max(initial=0))
        seen[user] = events, int(workload.query_time[row])
    assert len(seen) == 12


def test_slots_are_the_parts_of_the_whole() -> None:
    parts = list(generate_slots(STREAM, debug()))
    whole = generate(STREAM, debug())
    assert [int(part.key[0, 0]) for part in parts] == [3, 4, 5, 6]
    for name in FIELDS:
        assert np.array_equal(getattr(concatenate(parts), name), getattr(whole, name))


@pytest.mark.parametrize("name", ["gpu_point", "gpu_ecom", "gpu_mlperf"])
def test_gpu_profiles_generate(name: str) -> None:
    workload = generate(dataclasses.replace(PROFILES[name](), requests=3), debug())
    assert len(workload) == 3
    assert set(workload.candidate_counts.tolist()) <= {512, 2048}


def test_uniform_items_are_uniform_and_zipf_items_are_not() -> None:
    def hottest(zipf: float) -> float:
        profile = Profile(name="p", lengths=ConstLengths(value=2000), candidates=(1,), zipf=zipf, users=9, requests=20)
        return float(np.bincount(generate(profile, small_tables()).uih_item).max() / 40_000)

    assert hottest(0.0) < 0.004
    assert hottest(1.05) > 0.1


def test_config_without_tables_is_refused() -> None:
    with pytest.raises(ConfigError, match="no embedding tables"):
        generate(STREAM, dataclasses.replace(debug(), tables=()))


@pytest.mark.parametrize("config", [debug(), small_tables(), several_features()], ids=["debug", "small", "several"])
def test_batches_are_requests_that_a_model_accepts(config: HstuConfig) -> None:
    workload = generate(PROFILES["ci"](), config)
    rows = [5, 3, 250]
    packed = pack_request(config, *workload.batch(config, rows))
    check_request(packed, stage_specs(config, LIMITS, "fp32")["ranking"], LIMITS)
    assert np.array_equal(np.diff(packed["uih_offsets"]), workload.history_lengths[rows])
    sizes = {table.name: table.rows for table in config.tables}
    for name, features in (("uih_ids", config.uih_features), ("candidate_ids", config.candidate_features)):
        for column, feature in enumerate(features):
            assert 0 <= packed[name][:, column].max(initial=0) < sizes[config.table_of(feature).name]
    assert set(packed["uih_actions"].tolist()) <= set(config.action_weights or ())
    assert (packed["contextual_ids"] >= 0).all()


def test_categories_follow_from_items() -> None:
    config = small_tables()
    workload = generate(PROFILES["ci"](), config)
    packed = pack_request(config, *workload.features(config, 2))
    assert np.array_equal(packed["uih_ids"][:, 1], packed["uih_ids"][:, 0] // 18)
    assert np.array_equal(packed["candidate_ids"][:, 1], packed["candidate_ids"][:, 0] // 18)


def test_a_workload_of_another_model_is_refused() -> None:
    workload = generate(PROFILES["ci"](), debug())
    with pytest.raises(InputError, match=r"item \d+ .* table 'item_id' with 400 rows; generate"):
        workload.batch(small_tables(), range(len(workload)))


def test_files_and_folders_are_read_back(tmp_path: Path, ci: Workload) -> None:
    ci.save(tmp_path / "all" / "one.npz")
    ci.take([3, 4]).save(tmp_path / "parts" / "slot_000.npz")
    ci.take([5]).save(tmp_path / "parts" / "slot_001.npz")
    assert np.array_equal(Workload.load(tmp_path / "all/one.npz").uih_ts, ci.uih_ts)
    parts, expected = Workload.load(tmp_path / "parts"), ci.take([3, 4, 5])
    for name in FIELDS:
        assert np.array_equal(getattr(parts, name), getattr(expected, name))


DAMAGE = {
    "dtype": ({"uih_item": lambda a: a.astype(np.int64)}, "uih_item must be int32"),
    "start": ({"uih_off": lambda a: a + 1}, r"uih_off must begin with 0, got 1 at \[0\]"),
    "end": ({"cand_off": lambda a: np.append(a[:-1], a[-1] + 1)}, r"cand_off ends with \d+, but cand_item has \d+"),
    "fall": (
        {"cand_off": lambda a: a[[0, 2, 1, *range(3, len(a))]]},
        r"cand_off falls from 64 at \[1\] to 32",
    ),
    "short": ({"uih_ts": lambda a: a[:-1]}, "uih_ts must have shape"),
    "query": ({"query_time": lambda a: a[:-1]}, "query_time must have shape"),
    "offsets": ({"uih_off": lambda a: a[:-1]}, "uih_off must have shape"),
    "key": ({"key": lambda a: a[:, :1]}, "key must have shape"),
    "axes": ({"key": lambda a: a.ravel()}, "key must be int32 with 2 axes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, ci: Workload, name: str) -> None:
    changes, message = DAMAGE[name]
    arrays = {key: getattr(ci, key) for key in FIELDS}
    arrays |= {key: change(arrays[key]) for key, change in changes.items()}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        Workload.load(tmp_path / "w.npz")
    assert "w.npz" in str(caught.value)


def test_what_is_no_workload_is_refused(tmp_path: Path, ci: Workload) -> None:
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "other.npz", user_id=ci.user_id)
    (tmp_path / "empty").mkdir()
    for path, message in (("text.npz", "not a workload"), ("other.npz", "uih_off"), ("none.npz", "no workload at")):
        with pytest.raises(InputError, match=message):
            Workload.load(tmp_path / path)
    with pytest.raises(InputError, match=r"holds no workload"):
        Workload.load(tmp_path / "empty")


def test_profiles_need_candidates() -> None:
    with pytest.raises(ConfigError, match="candidate counts"):
        dataclasses.replace(STREAM, candidates=())
