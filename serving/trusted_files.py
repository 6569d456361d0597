"""The code that a server of TensorRT plans loads: only the plugin library that the plans were built with."""

from __future__ import annotations

import stat
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import MANIFEST_NAME, file_sha256, read_manifest
from hstu_trt.contract.plugin_files import PLUGIN_LIBRARY, autoload_library
from hstu_trt.serving.deployment import ENGINES_LINK, Deployment


def check_plugins(deployment: Deployment, given: Path | None = None) -> None:
    """The plugin library beside the autoload library against the sha256 in the manifest of the deployment's engines.

    Neither library nor their folder may be open for everybody to write. The autoload library has no digest: it is as
    trusted as its folder. Raises ArtefactError.
    """
    autoload = (given or autoload_library()).resolve()
    library = autoload.with_name(PLUGIN_LIBRARY)
    if not library.is_file():
        raise ArtefactError(f"{autoload} loads {PLUGIN_LIBRARY} from its own folder, and there is none; make plugins")
    for path in (autoload, library, autoload.parent):
        if path.stat().st_mode & stat.S_IWOTH:
            raise ArtefactError(f"{path} may be written by every user of this machine: chmod o-w {path}")
    engines = (deployment.path / ENGINES_LINK).resolve()
    manifest = read_manifest(engines, kind="engines", regenerate=f"hstu-trt engines --out {engines}", verify=False)
    built_with = manifest.get("plugins")
    if not isinstance(built_with, dict):
        return  # plans without plugin layers
    found = file_sha256(library)
    if found != built_with.get("sha256"):
        raise ArtefactError(
            f"{library} is not the plugin library that {engines / MANIFEST_NAME} names (sha256 {found[:12]}, not "
            f"{str(built_with.get('sha256'))[:12]}): name that one with --plugins, or build the engines again"
        )
