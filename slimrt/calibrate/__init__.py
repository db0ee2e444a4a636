"""``slimrt calibrate``: the fastest plans of one model within a stated loss of quality, found by measuring."""
