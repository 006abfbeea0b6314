"""Files of a corpus: which kind each is, and its records. Imports core."""
