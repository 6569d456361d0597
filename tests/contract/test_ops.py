"""Op specs: what ONNX nodes, torch ops and plugins agree on."""

import pytest

from hstu_trt.contract.model import AttentionOptions
from hstu_trt.contract.ops import HSTU_ATTENTION, OPS


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
def test_an_op_stands_in_our_domain_and_carries_its_plugin(spec):
    assert spec.plugin_attributes == {"plugin_version": "1", "plugin_namespace": "hstu.trt"}
    ports = [port.name for port in (*spec.inputs, *spec.outputs)]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
def test_optional_inputs_come_last(spec):
    flags = [port.optional for port in spec.inputs]
    assert flags == sorted(flags)


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
def test_defaults_have_their_kind(spec):
    kinds = {"int": int, "float": float, "string": str}
    assert all(type(attribute.default) is kinds[attribute.kind] for attribute in spec.attributes)


def test_every_attention_option_is_an_attribute():
    attributes = {attribute.name: attribute.default for attribute in HSTU_ATTENTION.attributes}
    options = AttentionOptions()
    for name in ("max_attn_len", "contextual_seq_len", "min_full_attn_seq_len"):
        assert attributes[name] == getattr(options, name)
