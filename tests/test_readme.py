"""The commands of the README and of docs/ run as they stand, and what the pages name exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_trt.contract.cli import VERBS
from hstu_trt.contract.config_json import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
ALL_PAGES = "\n".join(PAGES.values())
ROOMS = ("contract", "export", "plugins", "engines", "tables", "serving", "bench", "triton_repo")
SCRIPT = ROOT / "tests" / "readme.sh"


def run_readme(readme: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), str(readme)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tree with this environment as its .venv: what the commands write stays in there."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout: the list of files comes from git")
    for name in filter(None, listing.stdout.split("\0")):
        target = tmp_path / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    (tmp_path / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        (tmp_path / ".venv" / part.name).symlink_to(part)
    (tmp_path / ".venv" / "installed").unlink(missing_ok=True)
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


@pytest.mark.triton
def test_the_commands_run(checkout):
    result = run_readme(checkout / "README.md", checkout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "demo passed" in result.stdout
    pages = [path for path, text in PAGES.items() if "```bash run" in text and path.parent.name == "docs"]
    assert pages
    for path in pages:
        result = run_readme(path, checkout)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def planted(*blocks: tuple[str, str]) -> str:
    return "\n".join(f"text\n```{kind}\n{body}\n```" for kind, body in blocks)


SERVER = "bash -c 'trap \"exit {code}\" TERM; echo ready; while :; do sleep 0.1; done'"

PLANTED = {
    "passes": (planted(("bash run", "true"), ("bash", "false"), ("text", "false")), 0, "1 blocks"),
    "a failing command": (planted(("bash run", "true\nfalse\ntrue")), 1, "this block failed with exit code 1"),
    "a failing pipe": (planted(("bash run", "false | cat")), 1, "this block failed"),
    "no block": ("text", 1, "holds no block to run"),
    "a server": (planted(("bash serve", SERVER.format(code=0)), ("bash run", "true")), 0, "2 blocks"),
    "a server that dies": (planted(("bash serve", "echo planted cause")), 1, "planted cause"),
    "a server that ends badly": (planted(("bash serve", SERVER.format(code=3))), 1, "ended with code 3 on SIGTERM"),
    "a client that fails": (planted(("bash serve", SERVER.format(code=0)), ("bash run", "exit 4")), 1, "exit code 4"),
}


@pytest.mark.parametrize(("text", "code", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_the_script_can_fail(tmp_path, text, code, said):
    (tmp_path / "planted.md").write_text(text)
    result = run_readme(tmp_path / "planted.md", tmp_path)
    assert result.returncode == code, result.stderr
    assert said in result.stdout + result.stderr


def test_files_in_code_spans_exist():
    files = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|md|sh|pbtxt|safetensors))`", ALL_PAGES)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def anchors(page: str) -> set[str]:
    """What a link may name behind #: headings in lower case, blanks as -, without punctuation."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("[!.b]*/**/README.md")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target.read_text()), f"{name}#{anchor}"


def test_every_environment_variable_is_explained():
    """Those that the rooms name, as a string of their own in Python and C++, and in $ENV in CMake."""
    sources = [path for kind in ("py", "cpp", "h", "cmake") for path in ROOT.glob(f"*/**/*.{kind}")]
    text = "\n".join(path.read_text() for path in sources if path.relative_to(ROOT).parts[0] in ROOMS)
    named = set(re.findall(r'"(HSTU_TRT_[A-Z_]+)"|\$ENV\{(\w+)\}', text))
    variables = {name for match in named for name in match if name}
    assert {"HSTU_TRT_TABLES", "HSTU_TRT_PLUGINS", "HSTU_TRT_LIB", "TENSORRT_ROOT", "TRT_ROOT"} <= variables
    assert {name for name in variables if f"`{name}`" not in ALL_PAGES} == set()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"(?:`|^)make ([a-z-]+)", ALL_PAGES, flags=re.MULTILINE)
    assert named
    assert set(named) <= targets


def test_every_verb_is_explained():
    assert set(re.findall(r"`hstu-trt ([a-z]+)`", ALL_PAGES)) == set(VERBS)


def test_every_verb_that_is_called_exists():
    blocks = "\n".join(re.findall(r"^```bash[ a-z]*\n(.*?)^```", ALL_PAGES, flags=re.MULTILINE | re.DOTALL))
    called = set(re.findall(r"(?:^ *|bin/)hstu-trt ([a-z]+)", blocks, flags=re.MULTILINE))
    assert {"export", "serve", "fleet"} <= called <= set(VERBS)


def test_every_page_is_reached_from_the_readme():
    linked = re.findall(r"\]\((docs/\w+\.md)", README)
    assert {f"docs/{path.name}" for path in PAGES if path.parent.name == "docs"} == set(linked)
    beside_tables = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(beside_tables) <= 160, "a front door: details belong into docs/"


def test_the_example_of_a_config_is_one_that_can_be_exported():
    """Its tables cover every feature, and the request on the page names what the model reads."""
    page, config = (ROOT / "docs" / "your_model.md").read_text(), load_config(ROOT / "docs" / "shop.json")
    assert {name for table in config.tables for name in table.features} == set(config.embedding_features)
    assert {table.dim for table in config.tables} == {config.embedding_dim}
    times = {config.action_time_feature, config.action_weight_feature, config.query_time_feature}
    assert set(re.findall(r'^ *"(\w+)": \[', page, flags=re.MULTILINE)) | set(config.contextual_slots) == times | set(
        config.embedding_features
    )
    explained = set(re.findall(r"`(\w+)`", page))
    assert set(json.loads((ROOT / "docs" / "shop.json").read_text())) <= explained
