"""A stand-in for TensorRT's Python module.

The parser follows the rule measured with the real one: a node of ours becomes a plugin layer if a creator is
registered, else its function body, else an error. "Engines" are JSON that name the ONNX file; executing one runs ONNX
Runtime on the bytes that the runner put into "device" memory (``fake_driver.py``).
"""

import ctypes
import enum
import importlib.machinery
import json
import os
import types

import numpy as np
import onnx
import onnxruntime


def fake_module(driver=None, version="11.4.0.106"):
    """A module with the part of TensorRT's API that the engines room uses."""
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # others look whether TensorRT is installed
    for name, value in vars(_Api).items():
        if not name.startswith("__"):
            setattr(module, name, value)
    module.registry = _Registry()
    module.get_plugin_registry = lambda: module.registry
    module.Builder = lambda logger: _Builder(module)
    module.OnnxParser = lambda network, logger: _Parser(module, network, logger)
    module.Runtime = lambda logger: _Runtime(module, driver, logger)
    module.Refitter = lambda engine, logger: _Refitter(engine)
    module.OnnxParserRefitter = lambda refitter, logger: _ParserRefitter(refitter)
    module.configs = []
    return module


class _Api:
    class ILogger:
        ERROR, INTERNAL_ERROR, VERBOSE = "ERROR", "INTERNAL_ERROR", "VERBOSE"

    class IProgressMonitor:
        pass

    class IOutputAllocator:
        pass

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    BuilderFlag = enum.Enum("BuilderFlag", "TF32 REFIT STRIP_PLAN VERSION_COMPATIBLE")
    LayerType = enum.Enum("LayerType", "PLUGIN_V3 OTHER")
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
    HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "AMPERE_PLUS SAME_COMPUTE_CAPABILITY")
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE")
    nptype = staticmethod(lambda dtype: dtype)


class _Registry:
    def __init__(self):
        self.creators = set()

    def get_creator(self, name, version, namespace):
        return (name, version, namespace) if (name, version, namespace) in self.creators else None


class _Network:
    def __init__(self):
        self.layers, self.model, self.path = [], None, None
        self.num_layers = 0

    def get_layer(self, number):
        return types.SimpleNamespace(type=self.layers[number])


class _Parser:
    def __init__(self, module, network, logger):
        self.module, self.network, self.errors = module, network, []
        self.num_errors = 0

    def parse(self, data, path):
        graph = onnx.ModelProto.FromString(data)
        functions = {(f.domain, f.name) for f in graph.functions}
        for node in graph.graph.node:
            plugin = (node.op_type, "1", node.domain) in self.module.registry.creators
            if node.domain and not plugin and (node.domain, node.op_type) not in functions:
                self.errors.append("Plugin not found, are the plugin name, version, and namespace correct?")
                self.num_errors = 1
                return False
            self.network.layers.append(self.module.LayerType.PLUGIN_V3 if plugin else self.module.LayerType.OTHER)
        self.network.num_layers, self.network.path, self.network.model = len(self.network.layers), path, graph
        return True

    def get_error(self, number):
        return types.SimpleNamespace(desc=lambda: self.errors[number])


class _Cache:
    def __init__(self, data):
        self.data = set(data.decode().split())

    def combine(self, other, ignore_mismatch):
        self.data |= other.data
        return True

    def serialize(self):
        return " ".join(sorted(self.data)).encode()


class _Config:
    def __init__(self):
        self.flags, self.profiles, self.pools, self.cache = {"TF32"}, [], {}, None

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def clear_flag(self, flag):
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return None if data.startswith(b"damaged") else _Cache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class _Builder:
    def __init__(self, module):
        self.module = module

    def create_network(self, flags):
        assert flags == 2, "strongly typed in 10.x"
        return _Network()

    def create_builder_config(self):
        self.module.configs.append(_Config())
        return self.module.configs[-1]

    def create_optimization_profile(self):
        shapes = {}
        return types.SimpleNamespace(shapes=shapes, set_shape=lambda name, *bounds: shapes.__setitem__(name, bounds))

    def build_serialized_network(self, network, config):
        config.cache.data.add(f"tactics-of-{network.num_layers}")
        stripped = "STRIP_PLAN" in config.flags
        return json.dumps({"onnx": network.path, "profiles": config.profiles, "stripped": stripped}).encode()


class _Runtime:
    def __init__(self, module, driver, logger):
        self.module, self.driver, self.engine_host_code_allowed = module, driver, False

    def deserialize_cuda_engine(self, data):
        facts = json.loads(data)
        return _Engine(self.module, self.driver, facts) if facts else None


class _Engine:
    def __init__(self, module, driver, facts):
        self.module, self.driver, self.profiles = module, driver, facts["profiles"]
        self.weights = not facts["stripped"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self.session = onnxruntime.InferenceSession(facts["onnx"], options, providers=["CPUExecutionProvider"])
        self.ports = {port.name: port for port in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.ports)
        self.inputs = {port.name for port in self.session.get_inputs()}

    def get_tensor_name(self, number):
        return list(self.ports)[number]

    def get_tensor_mode(self, name):
        return self.module.TensorIOMode.INPUT if name in self.inputs else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        kinds |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
        return kinds[self.ports[name].type]

    def get_tensor_shape(self, name):
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.ports[name].shape)

    def create_execution_context(self, strategy):
        assert strategy is self.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses, self.allocators = engine, 0, {}, {}, {}
        self.switches, self.fails = [], False
        self.environment = dict(os.environ)

    def set_optimization_profile_async(self, number, stream):
        self.profile = number
        self.switches.append(number)
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address in self.engine.driver.live

    def set_output_allocator(self, name, allocator):
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream):
        if self.fails or not self.engine.weights:
            return False
        feed = {}
        for name, shape in self.shapes.items():
            dtype = np.dtype(self.engine.get_tensor_dtype(name))
            raw = self.engine.driver.live[self.addresses[name]]
            feed[name] = raw[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
        for port, value in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feed), strict=True):
            allocator = self.allocators[port.name]
            address = allocator.reallocate_output_async(port.name, 0, value.nbytes, 256, stream)
            if not address:  # as TensorRT gives up where an allocator has nothing
                return False
            allocator.notify_shape(port.name, value.shape)
            assert self.engine.driver.live[address].nbytes >= value.nbytes
            ctypes.memmove(address, np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


class _Refitter:
    def __init__(self, engine):
        self.engine, self.loaded = engine, False

    def refit_cuda_engine(self):
        self.engine.weights = self.loaded
        return self.loaded


class _ParserRefitter:
    def __init__(self, refitter):
        self.refitter = refitter

    def refit_from_bytes(self, data, path):
        onnx.ModelProto.FromString(data)
        self.refitter.loaded = True
        return True
