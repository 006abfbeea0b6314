"""Statistics on arrays. Imports core."""
