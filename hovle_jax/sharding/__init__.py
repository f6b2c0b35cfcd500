"""Where arrays lie on a mesh of devices, and the collectives that follow."""
