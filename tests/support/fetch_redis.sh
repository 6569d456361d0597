#!/usr/bin/env bash
# Unpacks Debian's Redis server, or Valkey's from its backports, and what it needs into a folder; nothing is installed
# and no service starts.
# usage: fetch_redis.sh FOLDER [redis|valkey]. Needs apt; root only where apt's lists of packages are empty.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)
kind=${2:-redis}
packages=("$kind-server" "$kind-tools" libjemalloc2 liblzf1)

command -v apt-get >/dev/null || { echo "no apt-get here: put a $kind-server on PATH instead" >&2; exit 2; }
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
cd "$packed"
apt=(-qq -o APT::Sandbox::User=root)

# Valkey is in the backports of Debian 12, which few machines list: they are read into lists of our own, from the mirror
# that the machine uses.
backports() {
  local site suite
  site=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' | head -1)
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME-backports")
  [[ -n $site ]] || { echo "apt knows no Debian mirror: run apt-get update as root, or put a valkey-server on PATH" >&2; exit 2; }
  mkdir -p lists/partial cache/archives/partial
  printf 'deb %s %s main\ndeb %s %s main\n' "$site" "$suite" "$site" "${suite%-backports}" >sources.list
  apt+=(-o "Dir::Etc::SourceList=$packed/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$packed/lists" -o "Dir::Cache=$packed/cache" -o APT::Get::List-Cleanup=0)
  apt-get "${apt[@]}" update
}

# Only a package that can be fetched has a file name.
known() { [[ $(apt-cache "${apt[@]}" show "$kind-tools" 2>/dev/null) == *Filename:* ]]; }
known || { [[ $kind == valkey ]] && backports; } || apt-get -qq update || true
known || { echo "apt knows no $kind-tools: run apt-get update as root, or put a $kind-server on PATH" >&2; exit 2; }

apt-get "${apt[@]}" download "${packages[@]}"
for package in *.deb; do dpkg -x "$package" "$target"; done
# A wrapper would change the process that a test kills, so whoever starts the server sets LD_LIBRARY_PATH.
LD_LIBRARY_PATH=$(dirname "$(find "$target" -name 'libjemalloc.so.2' | head -1)") "$target/usr/bin/$kind-server" --version
