"""Workloads, scoring, accuracy and benchmarks: the room that looks at all others and measures."""
