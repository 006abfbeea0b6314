"""Ready-made tests for a project without test files: `pytest --pyargs cascade.suite`."""
