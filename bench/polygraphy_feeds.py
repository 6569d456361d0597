"""``hstu-trt bench polygraphy``: valid requests for Polygraphy's own command line, which makes up random values else.

Random offsets and ids are no request. Writes OUT/inputs.json for ``--load-inputs`` and OUT/shapes.txt, the optimisation
profile for ``polygraphy convert`` and ``polygraphy run --trt``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from numpy.typing import NDArray

from hstu_trt.bench.arguments import count, suite_parser, whole
from hstu_trt.bench.chain import NORM, norm_tensor
from hstu_trt.bench.workloads.generate import DEFAULT_SEED
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import Requests, generate_requests, user_batches
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.model_folder import TAPS, ModelFolder, read_model_folder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import FUSED, Dim, StageSpec
from hstu_trt.tables.lookup_stage import HostLookup

FED_STAGES = (FUSED, "embedding_lookup", "hstu", TAPS)
"""Stages whose inputs follow from requests and tables alone."""


def feeds(model: ModelFolder, stage: str, requests: Requests, norm: float | None) -> Iterator[Tensors]:
    """The inputs of a stage for each batch of requests."""
    spec, config = stage_spec(model, stage), model.ranking_config
    with HostLookup(model) as lookup:
        for rows in user_batches(requests, model.limits):
            packed = requests.pack(rows)
            ids = {tensor.name: packed[tensor.name] for tensor in lookup.spec.inputs}
            known = {**packed, **lookup.infer(ids), NORM: norm_tensor(norm, config, packed)}
            yield {tensor.name: _shaped(known, tensor.name, len(tensor.dims)) for tensor in spec.inputs}


def stage_spec(model: ModelFolder, stage: str) -> StageSpec:
    """The inputs of a stage; those of ``hstu_taps`` are hstu's."""
    return model.specs["hstu" if stage == TAPS else stage]


def _shaped(known: Mapping[str, NDArray], name: str, dims: int) -> NDArray:
    return known[name].reshape(-1) if dims == 1 else known[name]


def shape_options(spec: StageSpec) -> str:
    """The contract's dims as Polygraphy's options of one optimisation profile."""
    lines = []
    for bound in ("min", "opt", "max"):
        shapes = [
            f"{tensor.name}:[{','.join(str(getattr(d, bound) if isinstance(d, Dim) else d) for d in tensor.dims)}]"
            for tensor in spec.inputs
        ]
        lines.append(f"--trt-{bound}-shapes {' '.join(shapes)}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Writes the files, prints the commands that take them."""
    parser = suite_parser("polygraphy", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="exported model folder")
    parser.add_argument("--stage", choices=FED_STAGES, default=FUSED, help="whose inputs (%(default)s)")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="requests to generate (%(default)s)")
    parser.add_argument("--requests", type=count, default=32, help="at most this many (%(default)s)")
    parser.add_argument("--seed", type=whole, default=DEFAULT_SEED, help="(default: %(default)s)")
    parser.add_argument("--attention-norm", help="fixed:<N> (default: the config's max_seq_len) or batch_max")
    parser.add_argument("--out", type=Path, required=True, help="folder for inputs.json and shapes.txt")
    args = parser.parse_args(argv)
    model = read_model_folder(args.model, verify=False)
    norm = parse_attention_norm(args.attention_norm, model.ranking_config)
    requests = generate_requests(model, profile=args.profile, count=args.requests, seed=args.seed)
    batches = list(feeds(model, args.stage, requests, norm))
    _write(args.out, batches, stage_spec(model, args.stage))
    onnx, inputs = (shlex.quote(str(path)) for path in (model.onnx(args.stage), args.out / "inputs.json"))
    tolerance = TOLERANCES["hstu" if args.stage == TAPS else args.stage, model.precision].atol
    print(f"wrote {args.out}: {len(requests)} requests in {len(batches)} batches for {args.stage}")
    print(f"polygraphy run {onnx} --onnxrt --load-inputs {inputs} --save-outputs {args.out}/outputs.json")
    print(f"  and to compare: --load-outputs {args.out}/outputs.json --atol {tolerance:g} --rtol 0")
    return 0


def _write(out: Path, batches: Sequence[Tensors], spec: StageSpec) -> None:
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    out.mkdir(parents=True, exist_ok=True)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json(list(batches), str(out / "inputs.json"))
    write_text_atomically(out / "shapes.txt", shape_options(spec) + "\n")
