#!/usr/bin/env bash
# Unpacks Debian's Redis server and what it needs into a folder; nothing is installed and no service starts.
# usage: fetch_redis.sh FOLDER. Needs apt; root only where apt's lists of packages are empty.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)
packages=(redis-server redis-tools libjemalloc2 liblzf1)

command -v apt-get >/dev/null || { echo "no apt-get here: put a redis-server on PATH instead" >&2; exit 2; }
# Only a package that can be fetched has a file name.
known() { [[ $(apt-cache show redis-tools 2>/dev/null) == *Filename:* ]]; }
known || apt-get -qq update || true
known || { echo "apt knows no redis-tools: run apt-get update as root, or put a redis-server on PATH" >&2; exit 2; }

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
cd "$packed"
apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}"
for package in *.deb; do dpkg -x "$package" "$target"; done
# A wrapper would change the process that a test kills, so whoever starts the server sets LD_LIBRARY_PATH.
LD_LIBRARY_PATH=$(dirname "$(find "$target" -name 'libjemalloc.so.2' | head -1)") "$target/usr/bin/redis-server" --version
