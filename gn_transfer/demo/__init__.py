"""A bundle in the browser."""
