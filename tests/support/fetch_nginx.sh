#!/usr/bin/env bash
# Unpacks Debian's nginx into a folder; nothing is installed and no service starts.
# usage: fetch_nginx.sh FOLDER. Needs apt; root only where apt's lists of packages are empty.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)

command -v apt-get >/dev/null || { echo "no apt-get here: put nginx on PATH instead" >&2; exit 2; }
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
cd "$packed"
apt=(-qq -o APT::Sandbox::User=root)

# Only a package that can be fetched has a file name.
known() { [[ $(apt-cache "${apt[@]}" show nginx 2>/dev/null) == *Filename:* ]]; }
known || apt-get -qq update || true
known || { echo "apt knows no nginx: run apt-get update as root, or put nginx on PATH" >&2; exit 2; }

# Its libraries (OpenSSL 3, PCRE2, zlib) come with every Debian that has Python.
apt-get "${apt[@]}" download nginx libpcre2-8-0
for package in *.deb; do dpkg -x "$package" "$target"; done
LD_LIBRARY_PATH=$(dirname "$(find "$target" -name 'libpcre2-8.so.0' | head -1)") "$target/usr/sbin/nginx" -v
