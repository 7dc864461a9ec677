"""A lifecycle node that asks a Molmo model about the newest image."""
