"""Processes of a rank that transform its batches while it trains on others."""
