"""The seam to the hardware: three backends with the same operations, weights opaque to all but their own backend."""
