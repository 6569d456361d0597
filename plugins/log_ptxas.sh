#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher: keeps what ptxas says about registers, spills and shared memory beside the object, in OBJECT.log,
# and prints the rest. `python -m hstu_trt.plugins report` reads the logs.
object=
previous=
for argument; do
    if [ "$previous" = -o ]; then object=$argument; fi
    previous=$argument
done
[ -n "$object" ] || exec "$@"

"$@" >"$object.log" 2>&1
status=$?
grep -vE '^ptxas info|^    [0-9]+ bytes stack frame|^$' "$object.log" >&2
[ $status -eq 0 ] || rm -f "$object.log"
exit $status
