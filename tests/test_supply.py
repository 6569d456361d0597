"""What the project depends on: pinned, under licences that are on a list, in the SBOM; and an audit that is honest."""

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OWN = "hstu-trt"
EXTRAS = set(re.search(r"^EXTRAS := (\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split(","))

# Of what is installed with the project. Those of MPL and ZPL are used as they come.
ALLOWED = re.compile(
    r"(Apache|MIT|BSD|3-Clause BSD|ISC|PSF|Python Software Foundation|MPL-2\.0|Mozilla Public License 2\.0|ZPL|Zope"
    r"|BSL-1\.0|Unlicense|CC0|MIT-CMU|HPND|LicenseRef-NVIDIA-Proprietary)",
)
# NVIDIA's own, for use with NVIDIA's GPUs: they are installed, never passed on.
PROPRIETARY = re.compile(r"(tensorrt|nvidia)-")
FORBIDDEN = re.compile(r"\b(A?GPL|General Public)", re.IGNORECASE)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def installed():
    """{name: metadata} of all that the project's extras bring, where it is installed."""
    found, waiting = {}, [(OWN, frozenset(EXTRAS))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        found[name] = distribution.metadata
        for text in distribution.requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in {*extras, ""}):
                waiting.append((canonical(wanted.name), frozenset(wanted.extras)))
    return found


def licence(fields):
    """What a package says of itself: an expression, or its classifiers, or the first line of its licence."""
    if fields.get("License-Expression"):
        return fields["License-Expression"]
    said = [text.split(" :: ")[-1] for text in fields.get_all("Classifier") or [] if text.startswith("License ::")]
    return ", ".join(said) or (fields.get("License") or "").strip().partition("\n")[0]


def head_of_licence_file(name):
    """The first line of the licence that lies beside a package which says nothing of itself."""
    files = [path for path in metadata.files(name) or [] if "licenses" in path.parts]
    return next((line.strip() for path in files for line in path.read_text().splitlines() if line.strip()), "")


def is_allowed(name, text):
    if PROPRIETARY.match(name):
        return True
    return bool(ALLOWED.search(text)) and not FORBIDDEN.search(text)


def test_licences_are_on_the_list():
    packages = installed()
    assert len(packages) > 50
    said = {name: licence(fields) or head_of_licence_file(name) for name, fields in packages.items()}
    assert {name: text for name, text in said.items() if not is_allowed(name, text)} == {}


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("a", "MIT", True),
        ("a", "Apache Software License", True),
        ("a", "GNU Affero General Public License v3", False),
        ("a", "MIT AND GPL-3.0-only", False),
        ("a", "", False),
        ("a", "Other/Proprietary License", False),
        ("tensorrt-rtx-cu13", "Other/Proprietary License", True),
    ],
)
def test_licences_are_told_apart(name, text, allowed):
    assert is_allowed(name, text) == allowed


def pins():
    """{name: version} of constraints.txt, whatever the Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(one.specifier).startswith("==") for one in wanted)
    return {canonical(one.name) for one in wanted}


def test_what_is_asked_for_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(text for extra in EXTRAS for text in extras[extra])]
    exact = {canonical(Requirement(text).name) for text in asked if "==" in text}
    assert len(asked) > 20
    assert {canonical(Requirement(text).name) for text in asked} - pins() - exact == set()


def test_the_sbom_is_valid_and_whole(tmp_path):
    """What ``make sbom`` runs."""
    recipe = re.search(r"^sbom:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    words = recipe.replace("\\\n", " ").split("-m cyclonedx_py", 1)[1].split()
    words = [str(tmp_path / "sbom.json") if word == "build/sbom.json" else word for word in words[:-1]]
    command = [sys.executable, "-m", "cyclonedx_py", *words, sys.executable]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    text = (tmp_path / "sbom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    assert bom["metadata"]["component"]["name"] == OWN
    listed = {canonical(component["name"]): component["version"] for component in bom["components"]}
    wanted = {name: fields["Version"] for name, fields in installed().items() if name != OWN}
    assert {name: version for name, version in wanted.items() if listed.get(name) != version} == {}


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "ops" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (3)"}
SELF = {"name": "hstu-trt", "skip_reason": "editable"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD, SELF], 0, "1 of 1 packages audited, 0 vulnerable"),
        ([GOOD, BAD], 1, "b 2: CVE-1, CVE-2"),
        ([GOOD, SKIPPED], 3, "NOT AUDITED: no advisories could be had for 1 of 2 packages: c"),
        ([BAD, SKIPPED], 1, "NOT AUDITED"),
        ([SKIPPED], 3, "0 of 1 packages audited"),
        ([], 3, "0 of 0 packages audited"),
        (None, 3, "the advisory service could not be asked"),
    ],
)
def test_an_audit_does_not_pretend(audit, packages, code, said):
    report = "" if packages is None else json.dumps({"dependencies": packages})
    found, lines = audit.verdict(report)
    assert found == code and any(said in line for line in lines)


def test_an_audit_that_gets_no_answer_ends(audit, monkeypatch, capsys):
    def never(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(audit.subprocess, "run", never)
    assert audit.main() == 3
    assert "could not be asked" in (said := capsys.readouterr().err) and "no answer within" in said
