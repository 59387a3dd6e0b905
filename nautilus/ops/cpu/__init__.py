"""C++ twins of ops for the CPU, behind a plain C interface."""
