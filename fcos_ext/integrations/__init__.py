"""Other libraries on our kernels. Nothing here is imported unless it is asked for."""
