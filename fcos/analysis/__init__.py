"""What FCOS can learn of a data set: ``fcos analyze`` and ``fcos targets``."""
