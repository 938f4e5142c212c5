"""The charts of a run, as figures of Plotly: the same for the live page and for the report."""
