#!/usr/bin/env bash
# Unpacks kustomize, from Debian 13, into a folder; nothing is installed. usage: fetch_kustomize.sh FOLDER. Needs apt.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)

command -v apt-get >/dev/null || { echo "no apt-get here: put kustomize on PATH instead" >&2; exit 2; }
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
cd "$packed"

# Debian 12 has none: that of Debian 13, which needs no later C library, is read into lists of our own, from the mirror
# that the machine uses.
site=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' | head -1)
[[ -n $site ]] || { echo "apt knows no Debian mirror: run apt-get update as root, or put kustomize on PATH" >&2; exit 2; }
mkdir -p lists/partial cache/archives/partial
printf 'deb %s trixie main\n' "$site" >sources.list
apt=(-qq -o APT::Sandbox::User=root -o "Dir::Etc::SourceList=$packed/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$packed/lists" -o "Dir::Cache=$packed/cache")
apt-get "${apt[@]}" update
apt-get "${apt[@]}" download kustomize
dpkg -x kustomize_*.deb "$target"
"$target/usr/bin/kustomize" version
