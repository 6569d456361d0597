"""An engines folder of words, for what only copies plans or reads their manifest."""

from pathlib import Path

from hstu_trt.contract.manifest import write_manifest

STAGES = ("embedding_lookup", "hstu", "mlp_head", "ranking_fused")


def make_engines(folder: Path, model, *, stages=STAGES, builder="tensorrt", digest=None) -> Path:
    """An engines folder as the engines room writes it, its plans being a word."""
    folder.mkdir()
    for stage in stages:
        (folder / f"{stage}.plan").write_text(f"plan of {stage}")
    entries = [
        {"stage": stage, "file": f"{stage}.plan", "details": {"profiles": ["single", "batch"]}} for stage in stages
    ]
    facts = {"builder": builder, "model": {"digest": digest or model.digest}, "stages": entries}
    files = [entry["file"] for entry in entries]
    write_manifest(folder, kind="engines", made_by="a test", files=files, facts=facts)
    return folder
