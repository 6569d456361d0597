"""The tables room: embedding tables on disk and their tiers."""
