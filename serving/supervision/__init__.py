"""Keeping a tritonserver alive and honest: canaries, watching, restarts, draining, events."""
