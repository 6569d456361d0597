# The table of contents: each target is one command. `make help` lists them.
SHELL := bash
.DEFAULT_GOAL := help
.SECONDARY:
.PHONY: help install demo serve test test-fast test-faults soak test-plugins lint typecheck accuracy diff plugins plugins-report tables-lib \
  guard-lib accuracy-gpu bench-kernels bench-tables bench-model bench-serve perf report side-by-side speed-page verify-tensorrt onnx \
  engines remote-lib remote-if-possible redis valkey nginx nginx-if-possible kustomize kustomize-if-possible fuzz fuzz-server sbom \
  audit clean look

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
ROOMS := contract export plugins engines tables serving bench
EXTRAS := export,engines,rtx,serving,bench,redis,dev,ops,fuzz

# Models that need no CONFIG= and WEIGHTS=: the trained checkpoint that the tests use, and the presets with random weights,
# whose tables would take a terabyte at full length.
CONFIG_demo := tests/golden/caseA/config.json
WEIGHTS_demo := tests/golden/ckptA
CONFIG_debug := debug
WEIGHTS_debug := random:1
CONFIG_dlrm_v3 := dlrm_v3
WEIGHTS_dlrm_v3 := random:1
ROWS_dlrm_v3 := --table-rows item_id=100000 --table-rows user_id=1000

# What onnx, engines and serve work on.
MODEL ?= demo
GIVEN := $(CONFIG)$(WEIGHTS)
CONFIG ?= $(CONFIG_$(MODEL))
WEIGHTS ?= $(WEIGHTS_$(MODEL))
IS_RANDOM := $(filter random%,$(WEIGHTS))
PRECISION ?= fp32
GPU ?= cpu
ARCHS ?= 90a
# Options of `hstu-trt engines`, e.g. BUILD="--builder tensorrt --opt-level 5"
BUILD ?=
ONNX := build/onnx/$(MODEL)/$(PRECISION)
ONNX32 := build/onnx/$(MODEL)/fp32
PLAN := build/plans/$(MODEL)
# How a deployment runs; other flavours than cpu have a deployment of their own for each precision.
FLAVOUR ?= cpu
OF_FLAVOUR := $(if $(filter-out cpu,$(FLAVOUR)),-$(FLAVOUR)-$(PRECISION))
# What it serves: ranking, ranking_fused, or both where it is empty; one of them has a deployment of its own, too.
SERVED ?=
OF_KIND := $(OF_FLAVOUR)$(SERVED:%=-%)
DEPLOYMENT ?= build/deployments/$(MODEL)$(OF_KIND)

# What the TensorRT plugins are compiled with where this machine has no headers of its own, and NVIDIA's runtimes (the
# libraries without the builder) that the tests load them into.
TENSORRT := build/tensorrt
OWN_HEADERS := $(TENSORRT_ROOT)$(TRT_ROOT)$(wildcard /usr/include/NvInfer.h /usr/include/*-linux-gnu/NvInfer.h)
HEADERS := $(if $(OWN_HEADERS),,$(TENSORRT)/headers/NvInfer.h)
PERF_ANALYZER := $(if $(shell command -v perf_analyzer),,build/perf_analyzer/unpacked)
LEAN := $(TENSORRT)/lean-10.15.1.29 $(TENSORRT)/lean-11.4.0.106

help:  ## list the targets
	@echo 'to begin    make demo'
	@echo 'your model  make onnx MODEL=mine CONFIG=config.json WEIGHTS=checkpoint/, then make serve|diff|perf MODEL=mine'
	@echo '            docs/your_model.md has the whole way'; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s%s\n", $$1, $$2 }' Makefile

install: $(INSTALLED)  ## make .venv/ with everything, the hstu-trt command included

CHECK_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else \
  "Python 3.10 to 3.12 is needed, $(PYTHON) is %d.%d: call make PYTHON=python3.12" % v)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)' && $(PYTHON) -m venv .venv
	@echo 'installing into .venv/: about 6 GB, some minutes'
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]' && touch $@

demo: install guard-lib  ## checkpoint -> ONNX -> Triton -> ranked candidates, checked on the way
	$(BIN)/hstu-trt bench demo

serve: install guard-lib $(DEPLOYMENT)/manifest.json  ## serve an exported model until Ctrl-C: MODEL= PRECISION= SERVED=ranking|ranking_fused
	$(BIN)/hstu-trt serve --deployment $(DEPLOYMENT)

test: install guard-lib $(LEAN) tables-lib remote-if-possible nginx-if-possible kustomize-if-possible  ## every test that this machine can run, but for test-faults
	$(BIN)/pytest -m "not faults"

test-fast: install guard-lib tables-lib  ## the tests that start no server
	$(BIN)/pytest -m "not triton and not redis"

test-faults: install guard-lib tables-lib remote-if-possible nginx-if-possible  ## faults, overload and bad input on running deployments, as long as in CI
	$(BIN)/pytest -m faults

# Half an hour at a moderate rate; three minutes of the same are part of the tests.
SOAK_S ?= 1800
soak: install tables-lib $(ONNX32)/manifest.json  ## a served model under load for long: nothing may grow; a row to bench/results/: SOAK_S= MODEL=
	$(BIN)/hstu-trt bench soak --model $(ONNX32) --seconds $(SOAK_S) $(SERVED:%=--served %)

test-plugins: plugins $(LEAN)  ## the plugins in NVIDIA's lean runtimes, and all else about plugins/ that needs no GPU
	$(BIN)/pytest tests/plugins -m "not gpu"

lint: install  ## style of the Python code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install  ## types of every room
	@mkdir -p build/links/hstu_trt && for room in $(ROOMS); do ln -sfn ../../../$$room build/links/hstu_trt/$$room; done
	MYPYPATH=build/links $(BIN)/mypy --namespace-packages --explicit-package-bases $(ROOMS:%=-p hstu_trt.%)

MODELS := $(foreach p,fp32 fp16 fp8,build/onnx/$(MODEL)/$(p)/manifest.json)

accuracy: install $(MODELS)  ## hold ONNX Runtime fp32, fp16, fp8 against PyTorch fp32, scores and ranking metrics: MODEL=
	$(BIN)/hstu-trt bench accuracy $(foreach p,fp32 fp16 fp8,--model-$(p) build/onnx/$(MODEL)/$(p)) --out build/accuracy/$(MODEL)

plugins: install $(HEADERS)  ## build the CUDA kernels and TensorRT plugins, no GPU needed: ARCHS=90a, 80,90a or all
	@$(BIN)/python -m hstu_trt.plugins toolchain >/dev/null 2>&1 || \
	  $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cuda]'
	$(BIN)/python -m hstu_trt.plugins build --archs '$(ARCHS)'
	$(BIN)/python -m hstu_trt.plugins check

# Without headers the kernels are built all the same.
$(TENSORRT)/headers/NvInfer.h: | install
	@rm -rf $(@D) $(TENSORRT)/wheel
	@$(BIN)/pip download --quiet --no-deps --constraint constraints.txt --dest $(TENSORRT)/wheel kernel-lens && \
	  $(BIN)/python -m zipfile -e $(TENSORRT)/wheel/kernel_lens-*.whl $(TENSORRT)/wheel && \
	  mv $(TENSORRT)/wheel/kernel_lens/include/tensorrt $(@D) && rm -r $(TENSORRT)/wheel && touch $@ || \
	  echo 'no headers of TensorRT: the plugin libraries are left out (TENSORRT_ROOT names an unpacked TensorRT)' >&2

$(TENSORRT)/lean-%: | install
	@rm -rf $@ $@.part
	$(BIN)/pip install --quiet --no-deps --no-compile --target $@.part tensorrt-lean-cu13-libs==$* tensorrt-lean-cu13-bindings==$*
	@mv $@.part $@

# The client of the remote tier: C++20 and nothing else; OpenSSL is loaded when TLS is asked for.
REMOTE_FLAGS := -std=c++20 -O2 -fPIC -fvisibility=hidden -fno-semantic-interposition -Wall -Wextra -Werror -MMD -MP
REMOTE_OBJECTS := $(patsubst tables/csrc/remote/%.cpp,build/remote/%.o,$(wildcard tables/csrc/remote/*.cpp))

remote-lib: build/lib/libhstu_trt_remote.so  ## build the client of the remote tables

build/lib/libhstu_trt_remote.so: $(REMOTE_OBJECTS)
	@mkdir -p $(@D)
	$(CXX) -shared -pthread -o $@.part $^ -ldl && mv $@.part $@

build/remote/%.o: tables/csrc/remote/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(REMOTE_FLAGS) -c -o $@ $<

-include $(REMOTE_OBJECTS:.o=.d)

redis: build/redis/usr/bin/redis-server  ## unpack Debian's Redis server into build/, for tests and benchmarks

# pytest tests/tables/remote under HSTU_TRT_REDIS_SERVER=build/valkey/usr/bin/valkey-server tries the same with Valkey.
valkey: build/valkey/usr/bin/valkey-server  ## unpack Valkey from Debian's backports into build/

# Where one of the two cannot be had, the tests of the remote tier are skipped; in CI that is an error.
remote-if-possible:
	@{ $(MAKE) -s -j2 remote-lib && { command -v redis-server || $(MAKE) -s redis; } >/dev/null; } || [ "$$CI" != true ]

build/redis/usr/bin/redis-server:
	tests/support/fetch_redis.sh build/redis

build/valkey/usr/bin/valkey-server:
	tests/support/fetch_redis.sh build/valkey valkey

nginx: build/nginx/usr/sbin/nginx  ## unpack Debian's nginx into build/, the gateway of `hstu-trt fleet`

build/nginx/usr/sbin/nginx:
	tests/support/fetch_nginx.sh build/nginx

# Where it cannot be had, the tests of the fleet are skipped; in CI that is an error.
nginx-if-possible:
	@{ command -v nginx || $(MAKE) -s nginx; } >/dev/null || [ "$$CI" != true ]

kustomize: build/kustomize/usr/bin/kustomize  ## unpack Debian's kustomize into build/, for the tests of ops/kubernetes

build/kustomize/usr/bin/kustomize:
	tests/support/fetch_kustomize.sh build/kustomize

kustomize-if-possible:
	@{ command -v kustomize || command -v kubectl || $(MAKE) -s kustomize; } >/dev/null || [ "$$CI" != true ]

# Damaged files and replies to all that reads them: SECONDS_EACH of Python, ROUNDS of each reader in C++ with sanitizers.
SECONDS_EACH ?= 120
# Targets of which coverage guides the damage, with _ for blanks.
GUIDED := weights:_state.pt weights:_old.pt weights:_0/sparse/.metadata sources:_items.npy sources:_0/sparse/.metadata \
  model_folder graph engines deployment lint:_models/ranking/config.pbtxt research_config workload settings
ROUNDS ?= 20000
FUZZED := $(addprefix plugins/csrc/trt/,json.cpp stored_table.cpp) $(addprefix tables/csrc/remote/,resp.cpp topology.cpp)
FUZZ ?= build/fuzz_native
fuzz: install tables-lib $(FUZZ)  ## damaged files and replies to all that reads them, at random and guided by coverage: SECONDS_EACH= ROUNDS=
	$(BIN)/python tests/fuzz/fuzz_tables.py --seconds $(SECONDS_EACH)
	$(BIN)/python tests/fuzz/fuzz_loaders.py --seconds $(SECONDS_EACH)
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then for target in $(GUIDED); do \
	  echo "guided: $$target" && $(BIN)/python tests/fuzz/fuzz_guided.py --target "$${target//_/ }" --seconds $(SECONDS_EACH) >build/guided.log 2>&1 || \
	  { tail -50 build/guided.log; exit 1; }; tail -1 build/guided.log; done; \
	else echo "no atheris (pip install '.[fuzz]' with Python 3.11 or later): nothing is guided by coverage"; fi
	@rm -rf build/fuzz && PYTHONPATH=tests/fuzz:$$PYTHONPATH $(BIN)/python -c \
	  'import pathlib, fuzz_tables; fuzz_tables.make_tables(pathlib.Path("build/fuzz"), 0)'
	$(FUZZ) build/fuzz $$(date +%s) $(ROUNDS)

# Bad input to a running deployment, SECONDS of it; what is found is written to build/fuzz_server with its SEED.
SEED ?=
SECONDS ?= 300
fuzz-server: install guard-lib $(DEPLOYMENT)/manifest.json  ## bad input to a running server over gRPC: SECONDS= SEED= MODEL=
	$(BIN)/hstu-trt bench fuzz --deployment $(DEPLOYMENT) --seconds $(SECONDS) $(SEED:%=--seed %)

$(FUZZ): tests/fuzz/fuzz_native.cpp $(FUZZED)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all -o $@ $^

plugins-report: install  ## registers, spills and shared memory of each CUDA kernel
	@$(BIN)/python -m hstu_trt.plugins report

LIB ?= build/lib
tables-lib: $(LIB)/libhstu_trt_tables.so  ## build the host tier of the tables, C++ alone; without a compiler numpy does its work

$(LIB)/libhstu_trt_tables.so: $(wildcard tables/csrc/*.*)
	@mkdir -p $(@D)
	@if command -v $(CXX) >/dev/null; then \
	  echo "$(CXX) -> $@" && $(CXX) -std=c++17 -O3 -Wall -Wextra -fPIC -shared -fvisibility=hidden -pthread -o $@.part tables/csrc/*.cpp && mv $@.part $@; \
	else echo "no C++ compiler ($(CXX)): lookups in tables will run in numpy, at about half the speed"; fi

# Without a compiler a server on loopback runs unguarded, and says so. Lazy: model processes load the second one, too.
GUARD := $(LIB)/libhstu_trt_guard.so $(LIB)/libhstu_trt_guard_frontend.so
guard-lib: $(GUARD)  ## build the guard of the server against malformed requests, C++ alone

$(GUARD): $(wildcard serving/csrc/*.cpp)
	@mkdir -p $(@D)
	@if command -v $(CXX) >/dev/null; then \
	  echo "$(CXX) -> $@" && $(CXX) -std=c++17 -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden -Wl,-z,lazy -o $@.part $(@F:libhstu_trt_%.so=serving/csrc/%.cpp) -ldl && mv $@.part $@; \
	else echo "no C++ compiler ($(CXX)): one malformed request can end the server"; fi

bench-model: plugins  ## check and time the whole model in process beside PyTorch, on a CUDA GPU; rows to bench/results/
	$(BIN)/hstu-trt bench model --profile

accuracy-gpu: plugins  ## entropy, accuracy and GAUC of the cuda runner in fp16 and fp8 on 4,096 requests, on a CUDA GPU; rows to bench/results/
	$(BIN)/hstu-trt bench gpu-accuracy

bench-kernels: plugins  ## check and time the CUDA kernels beside PyTorch, on a CUDA GPU; rows to bench/results/
	$(BIN)/hstu-trt bench kernels

# Load on a deployment: MODEL= or DEPLOYMENT=, and options of the command in LOAD=, e.g. LOAD="--slo-ms 20 --seconds 60".
LOAD ?=
LOADED := --deployment $(DEPLOYMENT) $(LOAD)

bench-serve: install $(DEPLOYMENT)/manifest.json  ## load on a deployment: single, offline, the rate at a bound, the curve; rows to bench/results/: MODEL= FLAVOUR=cpu|cuda PRECISION= LOAD=
	$(BIN)/hstu-trt bench serve $(LOADED)

perf: install $(DEPLOYMENT)/manifest.json $(PERF_ANALYZER)  ## NVIDIA's perf_analyzer on a deployment, beside our client in the same run: MODEL= LOAD=
	$(BIN)/hstu-trt bench perf $(LOADED)

side-by-side: install $(DEPLOYMENT)/manifest.json  ## a CPU deployment beside PyTorch eager in a Triton Python backend: MODEL= LOAD=
	$(BIN)/hstu-trt bench side-by-side $(LOADED)

report: install  ## every row in bench/results/ as one HTML page: build/report/report.html
	$(BIN)/hstu-trt bench report --out build/report/report.html

# The last client wheel that holds perf_analyzer and runs on glibc 2.36; where one is on PATH, that is taken.
build/perf_analyzer/unpacked: | install
	@rm -rf $(@D) && $(BIN)/pip download --quiet --no-deps --only-binary :all: --dest $(@D) tritonclient==2.45.0
	@$(BIN)/python -m zipfile -e $(@D)/tritonclient-2.45.0-*.whl $(@D) && rm $(@D)/*.whl && touch $@

verify-tensorrt: install $(LEAN)  ## on a machine with TensorRT: build, test and compare all of it; adds a row to bench/results/: PRECISIONS=fp16,fp8 GPU=
	$(BIN)/hstu-trt bench verify-tensorrt $(PRECISIONS:%=--precisions %) $(patsubst %,--gpu %,$(filter-out cpu,$(GPU)))

# DLRMv3 draws its ids uniformly; Zipf 0.8 and 1.05 are what others publish with. WAIT_S waits for a quiet machine.
WAIT_S ?= 0
bench-tables: install tables-lib remote-if-possible $(ONNX32)/manifest.json  ## embedding tables, each tier that is here beside what it replaces, and requests during refreshes; rows to bench/results/
	$(BIN)/hstu-trt bench tables --zipf 0 --zipf 0.8 --zipf 1.05 --wait-s $(WAIT_S)
	@if [ -f build/lib/libhstu_trt_remote.so ] && { [ -x build/redis/usr/bin/redis-server ] || command -v redis-server >/dev/null; }; then \
	  $(BIN)/hstu-trt bench remote; else echo 'no redis-server: the remote tier is left out'; fi
	$(BIN)/hstu-trt bench refresh --model $(ONNX32)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/hstu-trt bench tables-gpu; else echo 'no CUDA GPU: its tier is left out'; fi
	@$(MAKE) --no-print-directory speed-page

# The lines between two marks of a page become what the command prints.
speed-page: install  ## the tables and pictures of README and docs/, from the rows in bench/results/
	$(BIN)/hstu-trt bench plot-kernels --out docs/kernels.svg
	$(BIN)/hstu-trt bench plot-lookups --out docs/tables.svg
	$(BIN)/hstu-trt bench report --pictures docs
	@mkdir -p build
	@for part in table-attention:attention:README.md table-kernels:kernels:docs/speed.md table-model:model:docs/speed.md table-lookups:tables:docs/speed.md table-support:support:docs/tensorrt.md; do \
	  IFS=: read -r suite name page <<<"$$part"; { echo && $(BIN)/hstu-trt bench $$suite && echo; } >build/$$name.md && \
	  sed -i -e "/^<!-- $$name -->$$/,/^<!-- end of $$name -->$$/{//!d}" -e "/^<!-- $$name -->$$/r build/$$name.md" $$page || exit 1; done

# What diff compares: runner A with the model in precision REFERENCE, and runner B with the one in PRECISION.
A ?= torch
B ?= onnxruntime
REFERENCE ?= fp32
BUILT := $(if $(filter tensorrt%,$(A)),--engines-a build/engines/$(GPU)/$(MODEL)/$(REFERENCE)) \
  $(if $(filter tensorrt%,$(B)),--engines-b build/engines/$(GPU)/$(MODEL)/$(PRECISION))
DIFF := build/diff/$(MODEL)/$(subst :,-,$(A)_$(REFERENCE)_$(B)_$(PRECISION))

diff: install $(sort $(REFERENCE:%=build/onnx/$(MODEL)/%/manifest.json) $(ONNX)/manifest.json)  ## hold runner B against A, layer by layer, as HTML: A= B= MODEL= PRECISION= REFERENCE= GPU=
	$(BIN)/hstu-trt diff --model-a build/onnx/$(MODEL)/$(REFERENCE) --a $(A) --model-b $(ONNX) --b $(B) $(BUILT) --out $(DIFF)

# Random weights rank nothing, so there is no accuracy to plan by: their fp8 model is the default plan's.
onnx: install  ## export a checkpoint: MODEL= CONFIG= WEIGHTS= PRECISION=fp32|fp16|fp8; fp8 plans and calibrates first
ifeq ($(PRECISION),fp8)
	@$(MAKE) --no-print-directory $(if $(GIVEN),onnx PRECISION=fp32,$(ONNX32)/manifest.json)
	$(if $(IS_RANDOM),,$(BIN)/hstu-trt bench plan-precision --model $(ONNX32) --out $(PLAN))
	$(BIN)/hstu-trt export --weights $(ONNX32) --precision fp8 --out $(ONNX) \
	  $(if $(IS_RANDOM),,--plan $(PLAN)/plan.json --calibration $(PLAN)/calibration.safetensors)
else
	$(if $(WEIGHTS),,$(error $(NO_WEIGHTS)))
	$(BIN)/hstu-trt export $(CONFIG:%=--config %) --weights $(WEIGHTS) $(if $(IS_RANDOM),$(ROWS_$(CONFIG))) --precision $(PRECISION) --name $(MODEL) --out $(ONNX)
endif

NO_WEIGHTS = there is no model in $(ONNX), and $(MODEL) is not one of demo, debug, dlrm_v3, which are made from what is \
  here: make onnx MODEL=$(MODEL) CONFIG=config.json WEIGHTS=checkpoint PRECISION=$(PRECISION)

engines: install $(ONNX)/manifest.json  ## build engines of an exported model: GPU=l40s PRECISION=fp16 MODEL=; hstu-trt engines --list has the GPUs
	$(BIN)/hstu-trt engines --model $(ONNX) --gpu $(GPU) --precision $(PRECISION) --out build/engines/$(GPU)/$(MODEL)/$(PRECISION) $(BUILD)

sbom: install  ## every installed package with version and licence, as CycloneDX: build/sbom.json
	@mkdir -p build
	$(BIN)/python -m cyclonedx_py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --of JSON --output-file build/sbom.json $(BIN)/python

audit: install  ## known vulnerabilities of what is installed; fails where the advisory service cannot be asked
	$(BIN)/python ops/audit.py

clean:  ## remove what was built; .venv/ stays
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A model that is missing, or that was exported under another contract, is exported where its weights are known. One that
# is sound keeps its time, so nothing is made of it anew.
define CHECK_MODEL
import sys; from pathlib import Path
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.model_folder import read_model_folder
try: read_model_folder(Path(sys.argv[1]), verify=False)
except HstuTrtError as error: sys.exit(f"{error}")
endef
export CHECK_MODEL

build/onnx/%/manifest.json: look | install
	@$(BIN)/python -c "$$CHECK_MODEL" $(@D) || $(MAKE) --no-print-directory onnx MODEL=$(*D) PRECISION=$(*F)

look:

build/deployments/%$(OF_KIND)/manifest.json: build/onnx/%/$(PRECISION)/manifest.json
	$(BIN)/hstu-trt assemble --model $(<D) --flavour $(FLAVOUR) $(SERVED:%=--served %) --out $(@D)
