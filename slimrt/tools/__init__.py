"""Tools: what a model may call, the forms in which models write calls, and calls read back from what they wrote."""
