"""Errors, files, records and provenance. Imports no other subpackage."""
