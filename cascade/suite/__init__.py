"""Ready tests for a project that has none: `pytest --pyargs cascade.suite`."""
