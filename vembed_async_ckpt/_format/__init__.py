"""Pure functions for the files of a checkpoint: names, layouts and the manifest. Does not use the disk or import torch."""
