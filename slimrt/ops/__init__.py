"""The seam to the hardware: classes with the same operations (``numpy_ops`` today), weights opaque to all but them."""
