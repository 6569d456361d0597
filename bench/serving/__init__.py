"""Suites that put a deployment, or what stands in for one, under load."""
