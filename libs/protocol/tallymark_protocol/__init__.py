"""The Tallymark protocol: pure types, limits, formats and period arithmetic.

Nothing in this package touches a clock, a socket, a disk or an event loop. Modules that the SDK imports
(`limits`, `errors`, `model`, `periods`, `chunk`, `frames`, `messages`, `connection`) need msgspec and
google-crc32c only; `payload` and `kernels` need numpy and numba and are imported by the services alone.
"""
