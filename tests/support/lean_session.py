"""A process with one of NVIDIA's lean runtimes: ``lean_session.py FOLDER load|dlopen`` prints what it saw as JSON.

load: the plugin library through the registry. dlopen: the autoload library, as hosts do that know no registry.
Two runtimes cannot share a process, and TensorRT crashes at exit where plugins outlive their library.
"""

import ctypes
import json
import sys

import numpy as np

from hstu_trt.contract.ops import OP_DOMAIN, OP_VERSION, OPS
from hstu_trt.contract.plugin_files import autoload_library, plugin_library
from hstu_trt.plugins.trt_library import load_plugins

FOLDER, HOW = sys.argv[1:]
sys.path.insert(0, FOLDER)
import tensorrt_lean_bindings as trt  # noqa: E402

TYPES = {"int": (np.int32, trt.PluginFieldType.INT32), "float": (np.float32, trt.PluginFieldType.FLOAT32)}


def field(name, kind, value):
    """A field as the ONNX parser makes it from an attribute."""
    if kind == "string":
        return trt.PluginField(name, np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR)
    dtype, field_type = TYPES[kind]
    return trt.PluginField(name, np.array([value], dtype), field_type)


def ours(registry):
    return sorted(creator.name for creator in registry.all_creators if creator.plugin_namespace == OP_DOMAIN)


def look_at(registry, spec):
    """Creates a plugin from the spec's attributes, and tries bad ones."""
    creator = registry.get_creator(spec.name, OP_VERSION, OP_DOMAIN)
    if creator is None:
        return None
    fields = [field(a.name, a.kind, a.default) for a in spec.attributes]
    seen = {"fields": [f.name for f in creator.field_names]}
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin("layer", trt.PluginFieldCollection(fields), phase)
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        seen[str(phase)] = [type(build).__name__, core.plugin_name, core.plugin_namespace, build.timing_cache_id]
        del build, core, plugin
    bad = {"unknown": field("nonsense", "int", 1), "wrong value": field("output_type", "int", 7)}
    bad["wrong type"] = field("output_type", "float", 1.0)
    for name, one in bad.items():
        seen[name] = creator.create_plugin("layer", trt.PluginFieldCollection([one]), trt.TensorRTPhase.BUILD) is None
    none_at_all = creator.create_plugin("layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    seen["defaults"] = none_at_all is not None
    return seen


def main():
    registry = trt.get_plugin_registry()
    facts = {"version": trt.__version__, "before": ours(registry)}
    handle = None
    if HOW == "dlopen":
        ctypes.CDLL(str(autoload_library()))
    else:
        handle = registry.load_library(str(plugin_library()))
        load_plugins(registry)
    facts["loaded"] = ours(registry)
    facts["ops"] = {name: look_at(registry, spec) for name, spec in OPS.items()}
    if handle is not None:
        registry.deregister_library(handle)
        facts["unloaded"] = ours(registry)
        load_plugins(registry)
        facts["again"] = ours(registry)
    print(json.dumps(facts))


main()
