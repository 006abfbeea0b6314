"""Forward passes and generation with early exits. Imports core, models and exits."""
