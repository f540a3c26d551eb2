"""Integrations: the library behind other people's front doors. Importing this package imports none of them."""
