"""The serving room: a deployment put together, linted, launched on Triton, and a client of it."""
