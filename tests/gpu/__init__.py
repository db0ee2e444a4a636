"""Tests that a GPU makes worth more: they run on the CPU in ``make test``, on the device in ``make gpu``."""
