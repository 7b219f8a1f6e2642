"""The aggregation server. Torch-free."""
