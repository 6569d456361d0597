"""Suites of embedding tables in every tier, refreshes under load, and their section of docs/speed.md."""
