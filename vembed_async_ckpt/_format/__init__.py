"""The files of a checkpoint as pure functions: names, layouts and the manifest. Touches no disk, loads no torch."""
