#!/usr/bin/env bash
# Runs the README's commands in their order, from the repository's root: bash tests/readme.sh [README.md]
#   ```bash run    must end with exit code 0
#   ```bash serve  one command, started in the background: must print "ready", and must end with 0 on SIGTERM
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" # the pages say: source .venv/bin/activate

readme=${1:-README.md}
work=$(mktemp -d)
server=

stop() {
    if [[ -n $server ]]; then kill -TERM "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap stop EXIT

fail() {
    echo "README: $1" >&2
    exit 1
}

run() {
    echo "--- run: $(head -n 1 "$1")"
    bash -euo pipefail "$1" </dev/null || fail "this block failed with exit code $?: $(cat "$1")"
}

serve() {
    echo "--- serve: $(cat "$1")"
    bash -c "exec $(cat "$1")" </dev/null >"$work/server.log" 2>&1 &
    server=$!
    for _ in $(seq 600); do
        if grep -q '^ready' "$work/server.log"; then return; fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.2
    done
    fail "the server did not get ready: $(cat "$work/server.log")"
}

awk -v work="$work" '
    /^```bash (run|serve)$/ { file = sprintf("%s/%03d.%s", work, ++blocks, $2); next }
    /^```/ { file = "" }
    file { print > file }
' "$readme"

blocks=("$work"/[0-9]*)
[[ -e ${blocks[0]} ]] || fail "$readme holds no block to run"
for block in "${blocks[@]}"; do "${block##*.}" "$block"; done

if [[ -n $server ]]; then
    kill -TERM "$server"
    wait "$server" || fail "the server ended with code $? on SIGTERM"
    server=
fi
echo "${#blocks[@]} blocks of $readme ran"
