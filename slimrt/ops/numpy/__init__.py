"""The NumPy backend: the executable specification of every other one."""
