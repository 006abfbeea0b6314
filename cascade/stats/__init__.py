"""Statistics on arrays. Imports only core."""
