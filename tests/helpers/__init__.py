"""What several tests use. `tests/` is on sys.path (pyproject.toml), so that spawned processes find it too."""
