"""FDLO and IALS (paper §3.2): pure functions from similarities to groups and drawn units."""
