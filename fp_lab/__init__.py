"""Compares methods: many federations, each in one process, with the round logic and device code of the two daemons."""
