"""``make audit``: known vulnerabilities of what is installed here, by pip-audit.

    0   every package was asked about, and none has a known vulnerability
    1   some have
    3   the advisory service could not be asked, about some packages or at all: nothing is known of those

pip-audit itself ends with 0 where the service does not know a package, as behind a mirror without advisories.
"""

import json
import subprocess
import sys

OWN = {"hstu-trt"}
VULNERABLE, UNKNOWN = 1, 3
_MOST_NAMES = 10
_TIMEOUT_S = 120
"""One request per package, a second each at most where the service answers at all."""


def verdict(report: str) -> tuple[int, list[str]]:
    """Exit code and lines for people, of pip-audit's JSON; anything else means that it did not get that far."""
    try:
        packages = [entry for entry in json.loads(report)["dependencies"] if entry["name"] not in OWN]
        asked = [entry for entry in packages if "skip_reason" not in entry]
        flawed = [entry for entry in asked if entry["vulns"]]
        unknown = [entry["name"] for entry in packages if "skip_reason" in entry]
    except (ValueError, KeyError, TypeError):
        return UNKNOWN, ["NOT AUDITED: the advisory service could not be asked; nothing is known of any package"]
    lines = [
        f"{entry['name']} {entry['version']}: {', '.join(flaw['id'] for flaw in entry['vulns'])}" for entry in flawed
    ]
    if unknown or not asked:
        names = ", ".join(unknown[:_MOST_NAMES]) + (" ..." if len(unknown) > _MOST_NAMES else "")
        lines.append(f"NOT AUDITED: no advisories could be had for {len(unknown)} of {len(packages)} packages: {names}")
    lines.append(f"{len(asked)} of {len(packages)} packages audited, {len(flawed)} vulnerable")
    return VULNERABLE if flawed else UNKNOWN if unknown or not asked else 0, lines


def main() -> int:
    """Runs pip-audit on this environment."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        report, complaint = answer.stdout, answer.stderr
    except subprocess.TimeoutExpired:
        report, complaint = "", f"no answer within {_TIMEOUT_S} s"
    code, lines = verdict(report)
    if not report:
        lines += complaint.splitlines()[-3:]
    print("\n".join(lines), file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
