"""Models: loading, decoder layers, identity and operations. Imports core and stats."""
