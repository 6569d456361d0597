"""Workloads: lengths of history, popularity of items, and the requests that they make."""
